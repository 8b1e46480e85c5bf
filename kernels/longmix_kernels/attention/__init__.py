"""Softmax attention in which every query row sees a contiguous run of key rows."""

from longmix_kernels.attention.block_lists import block_list, butterfly_blocks, sink_and_local_blocks, stripe_blocks
from longmix_kernels.attention.bounds import key_bounds, positions_from_document_ids, row_bounds
from longmix_kernels.attention.chosen_blocks import KeyBlocks, attention_to_blocks, key_blocks
from longmix_kernels.attention.combine import bias_columns, merge
from longmix_kernels.attention.decode import column_mass, decode_attention
from longmix_kernels.attention.decode_launch import schedule_decoding
from longmix_kernels.attention.decode_schedule import Schedule
from longmix_kernels.attention.op import attention
from longmix_kernels.attention.ordering import Ordering, order_by_label
from longmix_kernels.attention.packed import packed, packed_supports
from longmix_kernels.attention.pattern import BlockList
from longmix_kernels.attention.probe_op import probe_attention
from longmix_kernels.attention.sdpa import sdpa, sdpa_supports
from longmix_kernels.attention.segments import Codes, Segment, packed_codes

__all__ = [
    "BlockList",
    "Codes",
    "KeyBlocks",
    "Ordering",
    "Schedule",
    "Segment",
    "attention",
    "attention_to_blocks",
    "bias_columns",
    "block_list",
    "butterfly_blocks",
    "column_mass",
    "decode_attention",
    "key_blocks",
    "key_bounds",
    "merge",
    "order_by_label",
    "packed",
    "packed_codes",
    "packed_supports",
    "positions_from_document_ids",
    "probe_attention",
    "row_bounds",
    "schedule_decoding",
    "sdpa",
    "sdpa_supports",
    "sink_and_local_blocks",
    "stripe_blocks",
]
