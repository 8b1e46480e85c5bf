"""The configuration: its types, its border to dicts, and the checks that run before any work.

`commands` has each command's words with types, ranges, defaults and meanings, `rules` checks them, `border` makes them
from what Hydra composed and turns them back into dicts, `choices` has what was chosen in a group, `nodes` checks and
builds what its `_target_` names, `values` says whether a value is of a type. `stages` has what a stage may say and
`course` which steps it takes, and `limits` counts a run's steps.
"""

from longmix.config.border import Plain as Plain
from longmix.config.border import check_keys as check_keys
from longmix.config.border import hydra_schema as hydra_schema
from longmix.config.border import plain as plain
from longmix.config.border import read as read
from longmix.config.border import resolved as resolved
from longmix.config.choices import Choice as Choice
from longmix.config.choices import Pattern as Pattern
from longmix.config.commands import EvaluateConfig as EvaluateConfig
from longmix.config.commands import GenerateConfig as GenerateConfig
from longmix.config.commands import ModelConfig as ModelConfig
from longmix.config.commands import OriginRecord as OriginRecord
from longmix.config.commands import PrepareConfig as PrepareConfig
from longmix.config.commands import StoredConfig as StoredConfig
from longmix.config.commands import TrainConfig as TrainConfig
from longmix.config.course import Course as Course
from longmix.config.course import StagePart as StagePart
from longmix.config.course import course_of as course_of
from longmix.config.course import limits_of as limits_of
from longmix.config.course import step_limits as step_limits
from longmix.config.course import tokens_per_step as tokens_per_step
from longmix.config.limits import flattened as flattened
from longmix.config.limits import total_steps as total_steps
from longmix.config.limits import unlimited_windows as unlimited_windows
from longmix.config.limits import with_limits as with_limits
from longmix.config.nodes import build as build
from longmix.config.nodes import check as check
from longmix.config.nodes import default_setting as default_setting
from longmix.config.nodes import holds_target as holds_target
from longmix.config.nodes import locate as locate
from longmix.config.nodes import node_kind as node_kind
from longmix.config.nodes import settings as settings
from longmix.config.nodes import unknown_key as unknown_key
from longmix.config.rules import default_of as default_of
from longmix.config.rules import defaults as defaults
from longmix.config.rules import words_of as words_of
from longmix.config.stages import STAGE as STAGE
from longmix.config.stages import STAGES as STAGES
from longmix.config.stages import Stage as Stage
from longmix.config.stages import StageSettings as StageSettings
from longmix.config.stages import reached as reached
from longmix.config.stages import settings_of_stages as settings_of_stages
from longmix.config.stages import with_stage as with_stage
from longmix.config.train_nodes import AdversarialConfig as AdversarialConfig
from longmix.config.train_nodes import DistilConfig as DistilConfig
from longmix.config.train_nodes import LoopConfig as LoopConfig
from longmix.config.train_nodes import MatchConfig as MatchConfig
from longmix.config.train_nodes import TaskWords as TaskWords
from longmix.config.train_nodes import TuningConfig as TuningConfig
from longmix.config.values import LARGEST_INTEGER as LARGEST_INTEGER
from longmix.config.values import LARGEST_SEED as LARGEST_SEED
from longmix.config.values import described as described
from longmix.config.values import fits as fits
from longmix.config.values import misfit as misfit
