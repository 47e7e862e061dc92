/* Fails the n-th call that changes a file below a directory; loaded with LD_PRELOAD.

   Counted are the calls of all threads and of child processes: open with O_CREAT, write, pwrite, writev, fsync,
   fdatasync, rename, unlink and mkdir, whoever makes them (Python, TensorStore, ArrayRecord). The environment says
   what happens, at the start of the process or when it calls fault_start():

     FAULT_DIR    the directory, absolute and without links
     FAULT_STATE  a file of struct state, mapped by all processes: the number of calls so far, and the failed call
     FAULT_AT     the call to fail, from 1; 0: count only
     FAULT_ERRNO  the error, such as 28 (ENOSPC)
     FAULT_STAYS  1: all calls from FAULT_AT on fail; on a full disk files can still be deleted and synchronized  */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

struct state {
  _Atomic unsigned long calls;
  _Atomic unsigned long failures;
  char failed[PATH_MAX]; /* "write PATH", of the first failure */
};

static char directory[PATH_MAX];
static size_t length;
static struct state *state;
static unsigned long fail_at;
static int error_number, stays;

/* Every wrapper finds the function it replaces. */
#define NEXT(name) \
  static __typeof__(&name) next; \
  if (!next) next = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

__attribute__((constructor)) void fault_start(void) {
  const char *folder = getenv("FAULT_DIR"), *file = getenv("FAULT_STATE"), *value;
  if (!folder || !file || state) return;
  int fd = open(file, O_RDWR);
  if (fd < 0) return;
  void *mapped = mmap(NULL, sizeof(struct state), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  close(fd);
  if (mapped == MAP_FAILED) return;
  length = strlen(folder);
  memcpy(directory, folder, length + 1);
  fail_at = (value = getenv("FAULT_AT")) ? strtoul(value, NULL, 10) : 0;
  error_number = (value = getenv("FAULT_ERRNO")) ? atoi(value) : EIO;
  stays = (value = getenv("FAULT_STAYS")) && *value == '1';
  state = mapped;
}

/* Counts a call on a path; returns whether it fails, with errno set. */
static int fails(const char *call, const char *path, int allocates) {
  if (strncmp(path, directory, length) || (path[length] && path[length] != '/')) return 0;
  unsigned long number = atomic_fetch_add(&state->calls, 1) + 1;
  if (!fail_at || (stays ? number < fail_at : number != fail_at)) return 0;
  if (stays && error_number == ENOSPC && !allocates) return 0;
  if (!atomic_fetch_add(&state->failures, 1)) snprintf(state->failed, sizeof state->failed, "%s %s", call, path);
  errno = error_number;
  return 1;
}

static int fails_fd(const char *call, int fd, int allocates) {
  char link[32], path[PATH_MAX];
  if (!state) return 0;
  int saved = errno;
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t size = readlink(link, path, sizeof path - 1);
  errno = saved;
  if (size <= 0) return 0;
  path[size] = 0;
  return fails(call, path, allocates);
}

static int fails_at(const char *call, int folder, const char *name, int allocates) {
  char link[32], path[PATH_MAX];
  if (!state || !name) return 0;
  if (*name == '/') return fails(call, name, allocates);
  int saved = errno;
  ssize_t size;
  if (folder == AT_FDCWD) {
    size = getcwd(path, sizeof path) ? (ssize_t)strlen(path) : -1;
  } else {
    snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
    size = readlink(link, path, sizeof path - 1);
  }
  errno = saved;
  if (size <= 0 || size + strlen(name) + 2 > sizeof path) return 0;
  path[size] = '/';
  strcpy(path + size + 1, name);
  return fails(call, path, allocates);
}

ssize_t write(int fd, const void *data, size_t count) {
  NEXT(write);
  return fails_fd("write", fd, 1) ? -1 : next(fd, data, count);
}

ssize_t pwrite(int fd, const void *data, size_t count, off_t offset) {
  NEXT(pwrite);
  return fails_fd("pwrite", fd, 1) ? -1 : next(fd, data, count, offset);
}

ssize_t pwrite64(int fd, const void *data, size_t count, off64_t offset) {
  NEXT(pwrite64);
  return fails_fd("pwrite", fd, 1) ? -1 : next(fd, data, count, offset);
}

ssize_t writev(int fd, const struct iovec *parts, int count) {
  NEXT(writev);
  return fails_fd("writev", fd, 1) ? -1 : next(fd, parts, count);
}

int fsync(int fd) {
  NEXT(fsync);
  return fails_fd("fsync", fd, 0) ? -1 : next(fd);
}

int fdatasync(int fd) {
  NEXT(fdatasync);
  return fails_fd("fdatasync", fd, 0) ? -1 : next(fd);
}

int rename(const char *from, const char *to) {
  NEXT(rename);
  return fails_at("rename", AT_FDCWD, to, 1) ? -1 : next(from, to);
}

int renameat(int from_folder, const char *from, int to_folder, const char *to) {
  NEXT(renameat);
  return fails_at("rename", to_folder, to, 1) ? -1 : next(from_folder, from, to_folder, to);
}

int renameat2(int from_folder, const char *from, int to_folder, const char *to, unsigned flags) {
  NEXT(renameat2);
  return fails_at("rename", to_folder, to, 1) ? -1 : next(from_folder, from, to_folder, to, flags);
}

int unlink(const char *path) {
  NEXT(unlink);
  return fails_at("unlink", AT_FDCWD, path, 0) ? -1 : next(path);
}

int unlinkat(int folder, const char *path, int flags) {
  NEXT(unlinkat);
  return fails_at("unlink", folder, path, 0) ? -1 : next(folder, path, flags);
}

int mkdir(const char *path, mode_t mode) {
  NEXT(mkdir);
  return fails_at("mkdir", AT_FDCWD, path, 1) ? -1 : next(path, mode);
}

int mkdirat(int folder, const char *path, mode_t mode) {
  NEXT(mkdirat);
  return fails_at("mkdir", folder, path, 1) ? -1 : next(folder, path, mode);
}

/* The mode is there only if the flags create a file. */
#define MODE(flags) \
  mode_t mode = 0; \
  if ((flags) & (O_CREAT | __O_TMPFILE)) { \
    va_list rest; \
    va_start(rest, flags); \
    mode = va_arg(rest, mode_t); \
    va_end(rest); \
  }

#define OPEN(name) \
  int name(const char *path, int flags, ...) { \
    NEXT(name); \
    MODE(flags) \
    return (flags & O_CREAT) && fails_at("open", AT_FDCWD, path, 1) ? -1 : next(path, flags, mode); \
  }

#define OPENAT(name) \
  int name(int folder, const char *path, int flags, ...) { \
    NEXT(name); \
    MODE(flags) \
    return (flags & O_CREAT) && fails_at("open", folder, path, 1) ? -1 : next(folder, path, flags, mode); \
  }

OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)
