#!/usr/bin/env bash
# Makes the images of this folder, in the current folder, with programs that share no code with Pillow's own writers:
#   apt-get install imagemagick libavif-bin libjpeg-turbo-progs libtiff-tools netpbm webp    (Debian 12)
#   bash make.sh
# Every image has 40x32 pixels: 5x4 blocks of 8x8, which JPEG at high quality keeps. tests/test_formats.py computes the
# same pixels: k = column + 5 * row of a block, gray k * maxval / 19, RGB (column * maxval / 4, row * maxval / 3,
# (19 - k) * maxval / 19), all rounded down.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
convert=/usr/bin/convert-im6.q16
command -v "$convert" > /dev/null || convert=convert

# plain KIND MAXVAL: the pattern as text, KIND P1 (bits, 1 is black), P2 (gray) or P3 (RGB).
plain() {
  awk -v kind="$1" -v max="$2" 'BEGIN {
    print kind; print 40, 32; if (kind != "P1") print max
    for (y = 0; y < 32; y++) for (x = 0; x < 40; x++) {
      c = int(x / 8); r = int(y / 8); k = c + 5 * r
      if (kind == "P1") print (c + r) % 2
      if (kind == "P2") print int(k * max / 19)
      if (kind == "P3") print int(c * max / 4), int(r * max / 3), int((19 - k) * max / 19)
    }
  }'
}

# pgm, ppm, pbm, pnm: text here, binary from netpbm
plain P2 255 > gray-plain.pgm
plain P2 65535 > gray16-plain.pgm
pamtopnm gray-plain.pgm > gray.pgm
plain P2 4095 | pamtopnm > gray12.pgm
pamtopnm gray16-plain.pgm > gray16.pgm
plain P3 255 | pamtopnm > rgb.ppm
cp rgb.ppm rgb.pnm
plain P3 65535 | pamtopnm > rgb16.ppm
plain P1 1 | pamtopnm > bits.pbm
$convert -size 40x32 xc:red ppm:"$tmp/red.ppm" # a second frame or page, which must not be read
pgmmake 0.5 40 32 > "$tmp/half.pgm"            # alpha channels: half transparent, opaque
pgmmake 1 40 32 > "$tmp/opaque.pgm"

# png
pnmtopng rgb.ppm > rgb.png
pnmtopng gray16.pgm > gray16.png
pnmtopng -transparent=black gray16.pgm > gray16-transparent.png
pnmtopng rgb16.ppm > RGB16.PNG
pnmtopng -alpha="$tmp/half.pgm" gray.pgm > gray-alpha.png
$convert gray16.pgm "$tmp/half.pgm" -compose CopyOpacity -composite -depth 16 gray16-alpha.png

# jpg, jpeg, jpe, jfif
cjpeg -quality 98 -sample 1x1 -outfile rgb.jpg rgb.ppm
cjpeg -quality 98 -sample 1x1 -progressive -outfile rgb.jfif rgb.ppm
cjpeg -quality 98 -sample 1x1 -restart 1 -outfile rgb.jpe rgb.ppm
cjpeg -quality 98 -grayscale -outfile gray.jpeg gray.pgm
$convert rgb.ppm -colorspace CMYK -quality 98 -sampling-factor 1x1 cmyk.jpg

# webp, avif
cwebp -quiet -lossless rgb.png -o rgb.webp
avifenc --lossless rgb.png rgb.avif > /dev/null
avifenc --min 0 --max 5 --depth 10 rgb.png rgb10.avif > /dev/null
avifenc --lossless --irot 3 rgb.png turned.avif > /dev/null # stored as it is, shown turned by 270 degrees

# bmp
ppmtobmp -bpp=24 rgb.ppm > rgb.bmp
ppmtobmp -bpp=8 rgb.ppm > palette.bmp
$convert rgb.ppm -define bmp:subtype=RGB555 rgb555.bmp
$convert rgb.ppm -alpha set -define bmp:format=bmp4 alpha.bmp

# gif
ppmtogif -quiet rgb.ppm > rgb.gif 2> /dev/null
ppmtogif -transparent=black rgb.ppm > transparent.gif 2> /dev/null
$convert -delay 10 rgb.ppm "$tmp/red.ppm" animated.gif

# tif, tiff
pamtotiff -lzw -truecolor rgb.ppm > rgb.tif
pamtotiff -packbits -indexbits=8 rgb.ppm > palette.tif 2> /dev/null
pamtotiff -none -truecolor "$tmp/red.ppm" > "$tmp/red.tif"
pamtotiff -none -truecolor rgb.ppm > "$tmp/rgb.tif"
tiffcp -c zip "$tmp/rgb.tif" "$tmp/red.tif" pages.tiff
tiffcp -c none -p separate "$tmp/rgb.tif" separate.tif
tiffcp -c zip -t -w 16 -l 16 "$tmp/rgb.tif" tiles.tif
tiffcp -c jpeg:r:98 "$tmp/rgb.tif" jpeg.tif
tiffcp -c lzw "$tmp/rgb.tif" turned.tif
tiffset -s 274 6 turned.tif # orientation: shown turned by 90 degrees
pamtotiff -none -minisblack gray16.pgm > gray16.tif
tiffcp -B -c none gray16.tif gray16-big.tif
tiffcp -B -c lzw gray16.tif gray16-big-lzw.tif
pamtotiff -lzw -miniswhite gray16.pgm > gray16-white.tif
pamtotiff -lzw -truecolor rgb16.ppm > rgb16.tif
$convert rgb16.ppm -depth 16 -interlace plane -compress none rgb16-separate.tif
$convert rgb16.ppm -depth 16 -interlace plane -compress lzw rgb16-separate-lzw.tif
$convert gray16.pgm -depth 12 -compress none gray12.tif
$convert gray.pgm "$tmp/half.pgm" -compose CopyOpacity -composite -compress lzw gray-alpha.tif
$convert gray.pgm "$tmp/opaque.pgm" -compose CopyOpacity -composite -alpha set -define tiff:alpha=associated \
  -compress lzw gray-premultiplied.tif
$convert rgb.ppm -colorspace CMYK -compress lzw cmyk.tif
$convert bits.pbm -compress group4 bits.tif

# What is refused: other channels, other numbers.
raw() { head -c "$((40 * 32 * $1))" /dev/zero | tr '\0' "$2"; } # BYTES_PER_PIXEL BYTE
raw 2 'a' > "$tmp/raw"; raw2tiff -M -w 40 -l 32 -b 2 "$tmp/raw" channels2.tif
raw 5 'a' > "$tmp/raw"; raw2tiff -M -w 40 -l 32 -b 5 "$tmp/raw" channels5.tif
cp channels2.tif extra.tif; tiffset -s 338 1 0 extra.tif # gray, and a channel of unspecified meaning
cp channels5.tif extra5.tif; tiffset -s 262 2 extra5.tif; tiffset -s 338 2 0 0 extra5.tif # RGB, and two such channels
raw 4 '?' > "$tmp/raw"; raw2tiff -M -w 40 -l 32 -d float "$tmp/raw" float.tif
raw2tiff -M -w 40 -l 32 -d long "$tmp/raw" int32.tif
raw 2 '?' > "$tmp/raw"; raw2tiff -M -w 40 -l 32 -d sshort "$tmp/raw" signed16.tif
raw 1 '?' > "$tmp/raw"; raw2tiff -M -w 40 -l 32 -d sbyte "$tmp/raw" signed8.tif
raw 3 '?' > "$tmp/raw"; raw2tiff -M -w 40 -l 32 -b 3 -p cielab "$tmp/raw" lab.tif
