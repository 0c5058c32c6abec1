"""Merge an adapter into its base model: a plain Hugging Face model, proved to compute the adapter's logits."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from ..config.model import STORED_DTYPES
from ..config.settings import said_as
from .script import Parser, quiet_transformers
from .serving import serving_lines

EXAMPLES = """
COMMAND ./outputs --merged ./merged
COMMAND ./outputs/checkpoint-50 --merged ./merged --dtype bfloat16 --push_to_hub NAME/MODEL
"""


def parse_args(argv: Sequence[str], command: str) -> argparse.Namespace:
    """What is merged, and where to.

    Raises:
        ValueError: an unknown flag, or one that is missing.
    """
    parser = Parser(command, f"{__doc__}\n{EXAMPLES}")
    parser.add_argument("output_dir", metavar="OUTPUT_DIR", help="a run's folder, a checkpoint, or any LoRA's folder")
    parser.add_argument("--merged", metavar="FOLDER", required=True, help="where to write; must be new or empty")
    parser.add_argument(
        "--dtype", choices=STORED_DTYPES, help="of the written weights (default: as the base model is stored)"
    )
    parser.add_argument(
        "--push_to_hub",
        metavar="NAME/MODEL",
        help="then upload to this hub repository, which is made if need be, public unless the account says otherwise",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None, command: str | None = None) -> None:
    """Merge and write.

    Args:
        argv: the flags; None: those of this process.
        command: what the user has called; None: `python -m tunix_torch.export`.

    Raises:
        ValueError: see `export_merged`.
        KeyboardInterrupt: after it has been said that nothing half-written is left.
    """
    args = parse_args(sys.argv[1:] if argv is None else argv, command or "python -m tunix_torch.export")
    # What loads PyTorch, which `--help` does without.
    from ..run.export import export_merged
    from ..run.folder import find_system_message

    quiet_transformers()
    folder = str(Path(args.output_dir))
    try:
        with said_as({f"model_name={folder!r}": f"output_dir={folder!r}"}):
            export_merged(args.output_dir, args.merged, args.dtype, args.push_to_hub)
        print(f"Ask it: tunix-torch ask --model_path {shlex.quote(args.merged)} --question 'What is 47 + 38?'")
        print("\n".join(serving_lines(args.merged, find_system_message(args.merged))))
    except KeyboardInterrupt:
        print("\nnothing half-written is left", file=sys.stderr)
        raise
