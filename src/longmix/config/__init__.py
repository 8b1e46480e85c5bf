"""The configuration's types, and the checks that run before any work.

`words` has the top-level words and the loop's settings, `nodes` checks and builds what a group's `_target_` names,
`values` says whether a value is of a type, `checks` refuses impossible words, `limits` counts a run's steps.
"""

from longmix.config.checks import (
    check_words as check_words,
)
from longmix.config.checks import (
    resolved as resolved,
)
from longmix.config.limits import (
    flattened as flattened,
)
from longmix.config.limits import (
    step_limits as step_limits,
)
from longmix.config.limits import (
    tokens_per_step as tokens_per_step,
)
from longmix.config.limits import (
    total_steps as total_steps,
)
from longmix.config.limits import (
    unlimited_windows as unlimited_windows,
)
from longmix.config.limits import (
    with_limits as with_limits,
)
from longmix.config.nodes import (
    Node as Node,
)
from longmix.config.nodes import (
    build as build,
)
from longmix.config.nodes import (
    check as check,
)
from longmix.config.nodes import (
    check_keys as check_keys,
)
from longmix.config.nodes import (
    holds_target as holds_target,
)
from longmix.config.nodes import (
    locate as locate,
)
from longmix.config.nodes import (
    node_kind as node_kind,
)
from longmix.config.nodes import (
    settings as settings,
)
from longmix.config.nodes import (
    unknown_key as unknown_key,
)
from longmix.config.values import (
    LARGEST_INTEGER as LARGEST_INTEGER,
)
from longmix.config.values import (
    LARGEST_SEED as LARGEST_SEED,
)
from longmix.config.values import (
    described as described,
)
from longmix.config.values import (
    fits as fits,
)
from longmix.config.values import (
    misfit as misfit,
)
from longmix.config.words import (
    EvaluateConfig as EvaluateConfig,
)
from longmix.config.words import (
    GenerateConfig as GenerateConfig,
)
from longmix.config.words import (
    LoopConfig as LoopConfig,
)
from longmix.config.words import (
    MatchConfig as MatchConfig,
)
from longmix.config.words import (
    PrepareConfig as PrepareConfig,
)
from longmix.config.words import (
    TrainConfig as TrainConfig,
)
from longmix.config.words import (
    TuningConfig as TuningConfig,
)
