"""The command line; see the head of the package."""

import argparse
import sys
from collections.abc import Sequence

from longmix import startup
from longmix.command_line.options import OptionParser, path_option
from longmix.command_line.program import as_called, in_dialect
from longmix.data.tokens.byte_level import MISSING_BYTES
from longmix.data.tokens.tokenizers import LibraryTokenizer
from longmix.errors import LongmixError
from longmix.interop.huggingface.export import DTYPES, KINDS, export
from longmix.interop.huggingface.load import import_folder


def main(words: Sequence[str] | None = None) -> int:
    """Export or import, as the arguments say, and return the exit code."""
    try:
        arguments = _parser().parse_args(words)
        arguments.run(arguments)
    except LongmixError as error:
        print(in_dialect(f"{type(error).__name__}: {error}"), file=sys.stderr)
        return error.exit_code
    return 0


def _parser() -> OptionParser:
    parser = OptionParser(
        prog=as_called("python -m longmix.interop.huggingface"),
        description="Checkpoints to Hugging Face folders, and back.",
    )
    commands = parser.add_subparsers(required=True, metavar="export|import")
    out = commands.add_parser("export", help="write a checkpoint as a folder that transformers loads")
    out.add_argument("checkpoint", type=path_option, help="folder of a run or checkpoint")
    out.add_argument("folder", type=path_option, help="to write; FILE.pth: RWKV-7 as its authors' code reads it")
    out.add_argument("--as", dest="kind", choices=KINDS, default="auto", help="only longmix needs longmix to run")
    out.add_argument("--dtype", choices=list(DTYPES), default="float32", help="of the weights")
    out.add_argument("--weights", choices=["trained", "ema"], default="trained", help="ema: averaged over the steps")
    out.add_argument("--force", action="store_true", help="replace the folder if it is there")
    out.set_defaults(run=_export)
    back = commands.add_parser("import", help="make a checkpoint of such a folder")
    back.add_argument(
        "folder", type=path_option, help="with config.json, safetensors and tokenizer.json; or RWKV-7's FILE.pth"
    )
    back.add_argument("checkpoint", type=path_option, help="folder to write the checkpoint to")
    back.add_argument("--separator", help="the token that starts each document; default: the one that begins a text")
    back.add_argument(
        "--missing-bytes",
        choices=MISSING_BYTES,
        help="what happens to characters that the tokenizer has no tokens for; default: refuse",
    )
    back.add_argument(
        "--tokenizer",
        type=path_option,
        help="tokenizer.json, rwkv_vocab_v20230424.txt, a folder with one, or bytes; default: that beside the model",
    )
    back.set_defaults(run=_import)
    return parser


def _export(arguments: argparse.Namespace) -> None:
    done = export(
        arguments.checkpoint, arguments.folder, arguments.kind, arguments.dtype, arguments.force, arguments.weights
    )
    print(f"wrote {done.parameters:,} parameters in {done.dtype} to {arguments.folder}, of type {done.model_type}")


def _import(arguments: argparse.Namespace) -> None:
    words = arguments.separator, arguments.missing_bytes, arguments.tokenizer
    done = import_folder(arguments.folder, arguments.checkpoint, *words)
    hint = "" if done.has_data else "; it says nothing of data, so an evaluation needs data="
    print(f"wrote {done.checkpoint} from a model of type {done.model_type}{hint}")
    if isinstance(done.tokenizer, LibraryTokenizer):
        ends = ", ".join(map(done.tokenizer.token_name, done.tokenizer.end_ids))
        print(f"documents begin with {done.tokenizer.token_name(done.tokenizer.separator_id)}, texts end at {ends}")


if __name__ == "__main__":
    startup.begin()
    sys.exit(main())
