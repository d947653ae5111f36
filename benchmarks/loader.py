"""Images a second of the loader on one core, beside the bare decoding that no loader can do without.

Run from the repository root: ``OMP_NUM_THREADS=1 python -m benchmarks.loader [--photos TAR]``. Photos are prepared,
packed and read back as in training; every case reads the same rows. Times are of the processor.
"""

from __future__ import annotations

import argparse
import io
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image

from data_prep.common.workers import ALONE
from data_prep.images.store import ImageStore, decode_rgb
from data_prep.packs import PackReader
from data_prep.progress import Reporter
from data_prep.recipe import load_recipe
from data_prep.steps import run
from pipeline.data.batches import BatchSource
from pipeline.data.images import ImageLoader, images_of
from pipeline.data.order import BatchOrder
from pipeline.masks import get_policy
from pipeline.model.preprocess import Preprocess

IMAGE_TOKENS = 144


def photo(seed: int, width: int, height: int) -> bytes:
    """Return a JPEG with detail at every scale, as photos have it; 640 x 480 take about 90 kB."""
    rng, pixels = np.random.default_rng(seed), np.zeros((height, width, 3))
    for cell in (256, 64, 16, 4, 1):
        small = rng.integers(0, 256, (height // cell + 2, width // cell + 2, 3), dtype=np.uint8)
        layer = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
        pixels += (np.asarray(layer) - 128.0) * cell**0.5 / 16
    stream = io.BytesIO()
    Image.fromarray((pixels + 128).clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def photos(options: argparse.Namespace) -> list[bytes]:
    """Return the JPEGs of a tar, or drawn ones."""
    if options.photos is None:
        return [photo(seed, *options.pixels) for seed in range(options.images)]
    with tarfile.open(options.photos) as tar:
        files = (tar.extractfile(member) for member in tar if member.name.endswith((".jpg", ".jpeg")))
        return [file.read() for file in files if file is not None][: options.images]


def make_packs(folder: Path, images: Sequence[bytes], seq_len: int) -> PackReader:
    """Prepare captioned images with the ordinary steps; return their packed rows."""
    with tarfile.open(folder / "photos.tar", "w") as tar:
        for number, image in enumerate(images):
            text = f"photo {number} of a street with red and green balls under a table".encode()
            for suffix, data in (("jpg", image), ("txt", text)):
                info = tarfile.TarInfo(f"{number:06d}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    pack = {"corpora": ["photos"], "template": "caption", "seq_len": seq_len, "epochs": 1}
    content = {
        "root": str(folder), "out": str(folder / "out"), "tokenizer": {"train": {"vocab_size": 300, "samples": 500}},
        "image_tokens": IMAGE_TOKENS, "corpora": {"photos": {"type": "webdataset", "tars": "photos.tar"}},
        "packs": {"pt": pack},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    run(load_recipe(str(folder / "recipe.yaml")), ALONE, Reporter(quiet=True))
    return PackReader(folder / "out" / "packs" / "pt")


def rate(work: Callable[[], int], repeats: int) -> float:
    """Return the images per processor second of the fastest repeat; ``work`` returns its number of images."""
    work()
    best = 0.0
    for _ in range(repeats):
        began = time.process_time()
        count = work()
        best = max(best, count / (time.process_time() - began))
    return best


def batches(packs: PackReader, tower: Preprocess, *, draft: bool) -> Callable[[], int]:
    """Return a reader of every row, as training reads them: rows, plans, labels and pixels."""
    order = BatchOrder(global_batch_size=len(packs), dp=1, microbatches=len(packs))
    kwargs = {"order": order, "dp_rank": 0, "policy": get_policy("mma"), "threads": 0, "ahead": 1}
    source = BatchSource(packs, preprocess=[tower], draft=draft, **kwargs)  # type: ignore[arg-type]
    return lambda: source.read(0).images


def normalised_on_the_host(images: Sequence[bytes], tower: Preprocess) -> int:
    """Decode, resize, and write normalised floats one image at a time, as image processors do."""
    for data in images:
        values = tower.resize(decode_rgb(data)).astype(np.float32) / np.float32(255)
        normal = (values - np.float32(tower.mean)) / np.float32(tower.std)
        torch.from_numpy(np.ascontiguousarray(normal.transpose(2, 0, 1)))
    return len(images)


def lines(options: argparse.Namespace) -> Iterator[str]:
    """Yield the table and what drafts change, line by line."""
    tower, images = Preprocess(options.side), photos(options)
    with tempfile.TemporaryDirectory() as name:
        packs = make_packs(Path(name), images, options.seq_len)
        cases: list[tuple[str, Callable[[], int]]] = [
            ("decode", lambda: len([decode_rgb(data) for data in images])),
            ("decode and resize", lambda: len([tower.resize(decode_rgb(data)) for data in images])),
            ("decode, resize, normalise on the host", lambda: normalised_on_the_host(images, tower)),
            ("loader", batches(packs, tower, draft=False)),
            ("loader, draft_jpeg", batches(packs, tower, draft=True)),
        ]
        size = sum(map(len, images)) / len(images) / 1000
        yield f"{len(images)} photos of {size:.0f} kB, resized to {options.side} px, rows of {options.seq_len:,} tokens"
        yield ""
        yield "| one core | images / s | of bare decoding |"
        yield "|---|---:|---:|"
        rates = [rate(work, options.repeats) for _, work in cases]
        for (case, _), found in zip(cases, rates, strict=True):
            yield f"| {case} | {found:.0f} | {found / rates[0]:.2f} |"
        yield ""
        yield draft_differs_by(packs, tower)


def draft_differs_by(packs: PackReader, tower: Preprocess) -> str:
    """Return how far the pixels of drafts are from those in full, of 255."""
    store = ImageStore(packs.directory / packs.manifest.image_store)
    both = [ImageLoader(store, [tower], draft) for draft in (False, True)]
    apart = [
        np.abs(np.subtract(*(loader.load(reference)[0].astype(int) for loader in both)))
        for reference in images_of(list(packs))
    ]
    mean, most = np.mean([one.mean() for one in apart]), max(int(one.max()) for one in apart)
    return f"draft_jpeg changes a pixel by {mean:.2f} of 255 on average, at most by {most}"


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loader", description=__doc__)
    parser.add_argument("--photos", type=Path, metavar="TAR", help="JPEGs to use instead of drawn ones")
    parser.add_argument("--images", type=int, default=108, help="number of photos (default: %(default)s)")
    parser.add_argument(
        "--pixels", type=int, nargs=2, default=[640, 480], help="size of drawn photos (default: 640 480)"
    )
    parser.add_argument("--side", type=int, default=384, help="input of the vision tower in px (default: %(default)s)")
    parser.add_argument("--seq-len", type=int, default=8192, help="tokens of a packed row (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="the fastest counts (default: %(default)s)")
    for line in lines(parser.parse_args(argv)):
        print(line, flush=True)


if __name__ == "__main__":
    main()
