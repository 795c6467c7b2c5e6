"""The command line that recipes apart and measures apart share: a study, its folder, its seeds."""

from __future__ import annotations

import argparse
from pathlib import Path

from experiments.plan import Plan, read_plan


def study_parser(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser of STUDY, --output_dir and --seeds, whose help is a module's `doc`; the rest is the command's own."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="YAML file of the study")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the study")
    parser.add_argument("--seeds", type=int, nargs="+", help="seeds in place of the file's")
    return parser


def plan_of(args: argparse.Namespace) -> Plan:
    """Read the study that parsed arguments name."""
    return read_plan(args.study, {} if args.seeds is None else {"seeds": args.seeds})
