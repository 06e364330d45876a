"""Everything a run can be: the schema, its checks, and how a config is read. Imports no torch.

``run.py`` and ``model.py`` list every field; ``load_config`` merges the files a config ``extends``,
the config itself and dotted overrides, rejects unknown keys, and runs every check that needs more
than one field.
"""

from distributed_lm.config.checks import (
    check_config,
    compile_obstacle,
    longest_input,
)
from distributed_lm.config.loading import (
    WHOLE_MODEL_LAYOUT,
    load_config,
    load_run_config,
    parse_lengths,
)
from distributed_lm.config.model import (
    T5_BUCKETS,
    T5_MAX_DISTANCE,
    AdaptiveConfig,
    Count,
    CountOrOff,
    ModelConfig,
    PositiveFloat,
    Section,
)
from distributed_lm.config.run import (
    NAME_PATTERN,
    CheckpointConfig,
    EvaluationConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    ScheduleConfig,
    SpikeConfig,
)

__all__ = [
    "NAME_PATTERN",
    "T5_BUCKETS",
    "T5_MAX_DISTANCE",
    "WHOLE_MODEL_LAYOUT",
    "AdaptiveConfig",
    "CheckpointConfig",
    "Count",
    "CountOrOff",
    "EvaluationConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PositiveFloat",
    "RunConfig",
    "ScheduleConfig",
    "Section",
    "SpikeConfig",
    "check_config",
    "compile_obstacle",
    "load_config",
    "load_run_config",
    "longest_input",
    "parse_lengths",
]
