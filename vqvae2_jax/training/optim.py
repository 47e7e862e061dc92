"""The optimizer of every stage. The paper states none: its tables 3 to 5 give only batch sizes and step counts."""

import dataclasses
from typing import Any

import optax

# The fields that decide the learned weights.
_RESUME_FIELDS = ('batch_size', 'learning_rate', 'warmup_steps', 'lr_schedule', 'adam_b2', 'weight_decay', 'clip_norm')
_RESUME_FIELDS += ('params_ema_decay',)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long and how to train one network: config.<stage>.training, whose types and defaults are in config/base.py.

    Attributes:
      steps: number of updates.
      batch_size: the global batch size.
      learning_rate: learning rate of Adam after the warm-up.
      warmup_steps: steps in which the rate rises from 0; at most `steps`.
      lr_schedule: 'constant', or 'cosine': to zero at `steps`.
      adam_b2: decay of Adam's second moment.
      weight_decay: decoupled, as in AdamW.
      clip_norm: largest norm of the whole gradient; 0: no clipping.
      grad_accum_steps: microbatches of a batch, one after another, to save memory.
      params_ema_decay: decay of the averaged weights, which evaluation and later stages use; 0: the last weights.
      log_every: steps between lines of the log.
      eval_every: steps between evaluations.
      eval_examples: number of validation examples at each evaluation; 0: all.
      image_every: steps between images; 0: never.
      save_every: steps between checkpoints.
      profile_steps: (), or the first and the last step of a trace.
      warn_usage: warns of a level that uses less than this share of its codes; 0: never.
      warn_perplexity: warns of a level whose batches have a lower perplexity; 0: never.
      warn_overfit: warns of a validation NLL that is above its best by this share; 0: never.
      warn_free_space: warns of a disk that has less room than this many checkpoints; 0: never.

    Raises:
      ValueError: two fields contradict each other; the message begins with the name of one.
    """

    steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int
    lr_schedule: str
    adam_b2: float
    weight_decay: float
    clip_norm: float
    grad_accum_steps: int
    params_ema_decay: float
    log_every: int
    eval_every: int
    eval_examples: int
    image_every: int
    save_every: int
    profile_steps: tuple[int, ...]
    warn_usage: float
    warn_perplexity: float
    warn_overfit: float
    warn_free_space: float

    def __post_init__(self):
        if self.warmup_steps > self.steps:
            raise ValueError(f'warmup_steps is {self.warmup_steps}; it must be at most steps={self.steps}')
        if list(self.profile_steps) != sorted(self.profile_steps):
            raise ValueError(f'profile_steps is {self.profile_steps}; the first step must not come after the last')

    def resume_settings(self) -> dict[str, Any]:
        """Returns the fields that a continued training must not change, by name.

        Left out are `steps`, unless the schedule is cosine; `grad_accum_steps`, which changes dropout masks and
        rounding only; and fields that say when to log, evaluate, save, trace or warn.
        """
        # A cosine schedule ends at `steps`; a constant rate can always continue.
        steps = () if self.lr_schedule == 'constant' else ('steps',)
        return {field: getattr(self, field) for field in (*_RESUME_FIELDS, *steps)}


def learning_rate_schedule(training: TrainConfig) -> optax.Schedule:
    """Returns a linear warm-up, followed by a constant rate or a cosine to zero."""
    warmup = optax.linear_schedule(0.0, training.learning_rate, max(training.warmup_steps, 1))
    after = optax.constant_schedule(training.learning_rate)
    if training.lr_schedule == 'cosine':
        after = optax.cosine_decay_schedule(training.learning_rate, max(training.steps - training.warmup_steps, 1))
    return optax.join_schedules([warmup, after], [training.warmup_steps])


def make_optimizer(training: TrainConfig) -> optax.GradientTransformation:
    """Returns Adam or AdamW, with clipping if `clip_norm` is above 0."""
    adam = optax.adamw(learning_rate_schedule(training), b2=training.adam_b2, weight_decay=training.weight_decay)
    # The state has the same structure with and without clipping, so that a training can continue with the other.
    clip = optax.clip_by_global_norm(training.clip_norm) if training.clip_norm else optax.identity()
    return optax.chain(clip, adam)
