"""FID, sFID, Inception Score, KID, precision and recall, CLIP score and prompt adherence of images.

    python eval/fid.py runs/var --reference VIRTUAL_imagenet256_labeled.npz          # a folder, or samples.npz
    python eval/fid.py runs/plain runs/zipar --reference scenes:1000                  # the second beside the first
    python eval/fid.py --preset llamagen-xl-384 --out runs/xl --reference VIRTUAL_imagenet256_labeled.npz
    python eval/fid.py --preset mini-mar --out runs/mar                               # all of it ships
    torchrun --nproc-per-node 8 eval/fid.py --preset var-d30 --out runs/d30 --reference VIRTUAL_imagenet256_labeled.npz

A preset draws what its protocol says (see eval/sample.py: resumable, by many processes), measures it, and prints the
published figure beside ours. A reference is an ADM .npz file, kept statistics (--save-statistics), a folder,
`scenes:N`, or a data set that torch-fidelity knows. Features are kept in --cache, so nothing is computed twice.

Figures in the space `scenes` (the shipped detector, for the small models, offline) are no FID and are labelled so.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from varaccel.console import tolerant_console
from varaccel.errors import InputError, VaraccelError
from varaccel.evaluation.extra import check_extra
from varaccel.evaluation.sampling.presets import IMAGENET_256, get_preset
from varaccel.evaluation.sampling.run_arguments import add_run_arguments, start_run, tell_failure


def main() -> int:
    tolerant_console()
    parser = _parser()
    options = parser.parse_args()
    try:
        check_extra("torch_fidelity", "torchmetrics")
        if bool(options.images) == (options.preset is not None):
            raise InputError("name either images or a --preset to draw.")
        if options.preset is not None:
            _follow_preset(options)
        _check_files(options)
        space = _space(options)  # refused before days of drawing
        if options.preset is not None and not _drawn(options):
            return 0
        return _measured(options, space)
    except VaraccelError as error:
        tell_failure("fid.py", error)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "images", nargs="*", metavar="IMAGES", help="folders, runs or .npz files; or a --preset"
    )
    parser.add_argument("--out", type=Path, help="folder of the run that a preset draws")
    parser.add_argument("--reference", help="what to compare with; the preset's own by default")
    parser.add_argument(
        "--metrics",
        nargs="+",
        metavar="METRIC",
        help="of fid, sfid, is, kid, pr; by default all that reference and space allow",
    )
    parser.add_argument(
        "--space",
        help="feature space, inception or scenes; by default inception if --weights are given or the reference is "
        "its statistics, else scenes",
    )
    parser.add_argument(
        "--weights",
        help="Inception's weights (VARACCEL_INCEPTION by default, else downloaded), or another detector",
    )
    parser.add_argument(
        "--clip", nargs="?", const="", metavar="CLIP", help="also the CLIP score, with this CLIP"
    )
    parser.add_argument("--recursive", action="store_true", help="search folders of the folders too")
    parser.add_argument("--crop", type=int, metavar="SIZE", help="shrink and crop images of folders to SIZE")
    parser.add_argument(
        "--corrupt", choices=("stop", "skip"), default="stop", help="files that cannot be read"
    )
    parser.add_argument("--resamples", type=int, help="bootstrap resamples for standard errors; 0 for none")
    parser.add_argument(
        "--feature-batch", type=int, default=64, help="images per pass of the feature network"
    )
    parser.add_argument(
        "--cache", type=Path, default=Path("outputs/features"), help="where features are kept"
    )
    parser.add_argument(
        "--save-statistics", type=Path, metavar="FILE", help="keep the statistics of the first set as .npz"
    )
    parser.add_argument("--json", type=Path, help="also write everything here; OUT/metrics.json for a preset")
    add_run_arguments(parser)
    return parser


def _follow_preset(options: argparse.Namespace) -> None:
    """Take from the preset what was not typed."""
    from varaccel.evaluation.metrics.references import ADM_REFERENCE

    preset = get_preset(options.preset)
    if options.out is None:
        raise InputError("name the folder of the run with --out.")
    if options.reference is None and preset.reference == IMAGENET_256:
        raise InputError(
            f"{options.preset} is measured against ADM's reference; fetch {ADM_REFERENCE} and name it with --reference."
        )
    options.reference = options.reference or preset.reference
    options.space = options.space or preset.space


def _check_files(options: argparse.Namespace) -> None:
    """Refuse what could not be written after days of drawing."""
    from varaccel.files import check_writable, check_writable_folder

    check_writable(options.json, options.save_statistics)
    check_writable_folder(options.cache)


def _drawn(options: argparse.Namespace) -> bool:
    """Draw what the preset says; whether this process goes on to measure it."""
    started = start_run(options, options.out)
    started.draw()
    options.images = [str(options.out)]
    options.json = options.json or options.out / "metrics.json"
    return bool(started.state.is_main_process)


def _space(options: argparse.Namespace) -> str:
    """The feature space, if all that it needs is there."""
    from varaccel.evaluation.metrics.feature_spaces import check_space
    from varaccel.evaluation.metrics.references import holds_inception_statistics
    from varaccel.evaluation.metrics.set_metrics import check_metrics

    if options.metrics is not None:
        check_metrics(options.metrics)
    inception = options.weights or (options.reference and holds_inception_statistics(options.reference))
    name = options.space or ("inception" if inception else "scenes")
    check_space(name, options.weights)
    return name


def _measured(options: argparse.Namespace, name: str) -> int:
    from rich.console import Console

    from varaccel.evaluation.metrics.clip_score import CLIP_MODEL, load_clip
    from varaccel.evaluation.metrics.feature_spaces import load_space
    from varaccel.evaluation.metrics.measured_sets import measure_sets
    from varaccel.files import write_text
    from varaccel.nn.devices import GPU, HOST, has_gpu

    device = GPU if options.device != HOST and has_gpu() else HOST
    clip = None if options.clip is None else load_clip(options.clip or CLIP_MODEL).to(device)
    spatial = name == "inception" and (options.metrics is None or "sfid" in options.metrics)
    report, statistics = measure_sets(
        options.images,
        load_space(name, weights=options.weights, device=device, spatial=spatial),
        reference=options.reference,
        metrics=options.metrics,
        clip=clip,
        preset=None if options.preset is None else get_preset(options.preset),
        recursive=options.recursive,
        crop=options.crop,
        on_corrupt=options.corrupt,
        batch_size=options.feature_batch,
        cache=options.cache,
        resamples=options.resamples,
    )
    Console().print(report.table())
    if options.save_statistics is not None:
        statistics.save(options.save_statistics)
        print(f"wrote {options.save_statistics}, fingerprint {statistics.fingerprint}")
    if options.json is not None:
        write_text(json.dumps(report.to_dict(), indent=2, default=str) + "\n", options.json)
        print(f"wrote {options.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
