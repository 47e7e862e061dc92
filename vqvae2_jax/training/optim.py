"""The optimizer of every stage. The paper states none (its tables 3 to 5 give only batch sizes and step counts)."""

import dataclasses

import optax


@dataclasses.dataclass(frozen=True)
class Training:
    """How long and how to train one stage; built as Training(**config.<stage>.training)."""

    steps: int
    batch_size: int  # global: over all devices
    learning_rate: float
    warmup_steps: int = 0
    decay: str = 'constant'  # or 'cosine', to zero at `steps`
    b2: float = 0.999  # Adam's second moment
    weight_decay: float = 0.0  # decoupled (AdamW)
    clip_norm: float = 0.0  # of the whole gradient; 0: off
    accumulate: int = 1  # parts that a batch is taken in, one after the other, to save memory
    params_ema_decay: float = (
        0.999  # average of the weights used by evaluation and by later stages; 0: the last weights
    )
    log_every: int = 50
    eval_every: int = 500
    eval_examples: int = 0  # of the validation split, at each evaluation; 0: all
    show_every: int = 0  # pictures; 0: never
    save_every: int = 500  # checkpoints

    def __post_init__(self):
        for field in ('steps', 'batch_size', 'accumulate', 'log_every', 'eval_every', 'save_every', 'learning_rate'):
            if getattr(self, field) <= 0:
                raise ValueError(f'training.{field} must be positive; it is {getattr(self, field)}')
        for field in ('warmup_steps', 'weight_decay', 'clip_norm', 'eval_examples', 'show_every'):
            if getattr(self, field) < 0:
                raise ValueError(f'training.{field} must be 0 or more; it is {getattr(self, field)}')
        if self.decay not in ('constant', 'cosine'):
            raise ValueError(f"training.decay must be 'constant' or 'cosine'; it is {self.decay!r}")
        if not 0 <= self.params_ema_decay < 1:
            raise ValueError(f'training.weight_ema must lie in [0, 1); it is {self.weight_ema}')

    def identity(self) -> dict:
        """The fields that decide what is learned, as opposed to how often it is looked at or saved."""
        fields = [
            'batch_size',
            'learning_rate',
            'warmup_steps',
            'decay',
            'b2',
            'weight_decay',
            'clip_norm',
            'weight_ema',
        ]
        if self.decay != 'constant':
            fields.append('steps')  # the schedule ends there; a constant rate may always go on
        return {field: getattr(self, field) for field in fields}


def learning_rate_schedule(training: Training) -> optax.Schedule:
    """Linear warm-up, then constant or a cosine to zero."""
    warmup = optax.linear_schedule(0.0, training.learning_rate, max(training.warmup_steps, 1))
    after = optax.constant_schedule(training.learning_rate)
    if training.decay == 'cosine':
        after = optax.cosine_decay_schedule(training.learning_rate, max(training.steps - training.warmup_steps, 1))
    return optax.join_schedules([warmup, after], [training.warmup_steps])


def make_optimizer(training: Training) -> optax.GradientTransformation:
    """Adam or AdamW, with clipping where asked."""
    adam = optax.adamw(learning_rate_schedule(training), b2=training.b2, weight_decay=training.weight_decay)
    if not training.clip_norm:
        return adam
    return optax.chain(optax.clip_by_global_norm(training.clip_norm), adam)
