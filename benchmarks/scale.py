"""What 300, 10,000 and 1,000,000 scans cost: python -m benchmarks.scale; the tables of docs/scaling.md: ... --table

Measured, each in a process of its own: opening and drawing from a store whose index has that many entries (all point
into one small shard), 64 ranks drawing from it, crops of a store behind a URL, preparing one large CT, and many of them
by one process and by two, a nano step, a synthetic pair. The tables are these numbers times the number of scans, and
what `Assumed` says.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import pickle
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch

from benchmarks.timing import RESULTS, machine
from gvsl_zoo.pretrain.anatomy import sample_subject
from gvsl_zoo.pretrain.config import PRESETS, PretrainConfig
from gvsl_zoo.pretrain.data import Numbers, Pairs, StorePairs, SyntheticPairs
from gvsl_zoo.pretrain.prepare import prepare_store
from gvsl_zoo.pretrain.store import ENTRY, VOXEL, Format, Store, format_facts, shard_path
from gvsl_zoo.pretrain.upload import upload_store

PAGE = Path(__file__).parent.parent / "docs/scaling.md"
SIZES = (300, 10_000, 1_000_000)
STRATA = 50
VOLUMES, SHAPE, SPACING_MM, CROP = 4, (160, 205, 205), 2.0, (96, 96, 96)  # of the shard: the CT below at 2 mm
RANKS, STEPS, BATCH = 64, 1000, 2
CT_SHAPE, CT_MM = (512, 512, 400), 0.8  # (x, y, z)
SPACINGS_MM = (1, 2, 4)
FAR_S = 0.03  # of every answer of a far object store
SCANS = 24  # prepared by one process and by two
Facts = dict[str, Any]


# --- A store of any size ------------------------------------------------------------------------------------------


def fabricate(folder: Path, count: int) -> Path:
    """A store whose index has `count` entries: a third share their subject with one other, 50 strata go as 1/rank."""
    rng = np.random.default_rng(count)
    (folder / "shards").mkdir(parents=True)
    (folder / "store.json").write_text(json.dumps(format_facts(Format(3, "HU", SPACING_MM), "benchmarks.scale")))
    rng.integers(-1024, 1024, (VOLUMES, *SHAPE), VOXEL.type).tofile(shard_path(folder, 0))
    index = index_of(count, rng)
    np.save(folder / "index.npy", index)
    (folder / "subjects.txt").write_text("".join(f"patient-{i}\n" for i in range(index["subject"].max() + 1)))
    (folder / "strata.txt").write_text("".join(f"region-{i}\n" for i in range(STRATA)))
    return folder


def index_of(count: int, rng: np.random.Generator) -> np.ndarray:
    """Entries in no order; both scans of a subject lie in its stratum."""
    twins = count // 6
    subject = np.concatenate([np.arange(count - twins), np.arange(twins)])
    sizes = 1 / np.arange(1, STRATA + 1)
    stratum = rng.choice(STRATA, count - twins, p=sizes / sizes.sum())[subject]
    order = rng.permutation(count)
    index = np.zeros(count, ENTRY)
    index["offset"] = rng.integers(0, VOLUMES, count) * np.prod(SHAPE)
    index["shape"], index["spacing_mm"] = SHAPE, SPACING_MM
    index["subject"], index["stratum"] = subject[order], stratum[order]
    return index


class Indices(StorePairs):
    """Draws as StorePairs does, and returns which volumes instead of their crops."""

    def _crop(self, number, place, generator):
        return number


# --- What is measured, each in a process of its own -----------------------------------------------------------------


def measure_index(folder: str) -> Facts:
    """Opening, memory, draws and pickle of a store's pairs."""
    before, start = resident(), time.perf_counter()
    pairs = StorePairs(Store(folder), CROP, SPACING_MM)
    opened = time.perf_counter() - start
    after = resident()
    for number in range(min(64, len(pairs.store))):
        pairs.store.volume(number).max()  # the shard is in memory
    np.ones(3 * 2**20)  # 24 MB come and go: from then on glibc keeps freed memory, as in a process that has run a while
    generator = torch.Generator().manual_seed(0)
    indices = Indices(pairs.store, CROP, SPACING_MM)
    start = time.perf_counter()
    pickled = pickle.dumps(pairs)
    pickle.loads(pickled)
    return {
        "open_seconds": opened,
        "own_MB": (after["RssAnon"] - before["RssAnon"]) / 1e6,
        "shared_MB": (after["RssFile"] - before["RssFile"]) / 1e6,  # of the index, mapped: one copy a machine
        "pickle_bytes": len(pickled),
        "pickle_seconds": time.perf_counter() - start,
        "indices_us": 1e6 * median_seconds(lambda: indices.draw(generator), 2000),
        "pair_us": 1e6 * median_seconds(lambda: pairs.draw(generator), 200),
    }


def resident() -> dict[str, int]:
    """Bytes of this process in memory: its own (RssAnon), and mapped files that others share (RssFile)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssA", "RssF"))}


def median_seconds(run, count: int) -> float:
    seconds = []
    for _ in range(count // 10 + count):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[count // 10 :])  # the first ones warm up


def measure_ranks(folder: str) -> Facts:
    """What 64 ranks draw in 1,000 steps; chi2 a degree of freedom is near 1 where only chance makes a difference."""
    store = Store(folder)
    config = PretrainConfig(STEPS, crop=(16, 16, 16), spacing_mm=SPACING_MM, synthetic_share=0.0, ramp_steps=0)
    pairs = Pairs(config, Indices(store, CROP, SPACING_MM), BATCH * RANKS)
    drawn = [[n for batch in Numbers(0, STEPS, BATCH, 1, RANKS, rank) for n in batch] for rank in range(RANKS)]
    volumes = np.array([[pairs[n][:2] for n in numbers] for numbers in drawn])  # (ranks, pairs, 2)
    fixed, stratum, subject = volumes[..., 0], store.entries["stratum"], store.entries["subject"]
    counts = np.array([np.bincount(stratum[row], minlength=STRATA) for row in fixed])  # (ranks, strata)
    counts = counts[:, counts.any(0)]
    by_size = np.argsort(counts.sum(0))
    lowest, highest = np.full(STRATA, len(store)), np.zeros(STRATA, int)
    np.minimum.at(lowest, stratum, subject)
    np.maximum.at(highest, stratum, subject)
    able = int((lowest < highest)[stratum].sum())  # volumes whose stratum has two subjects
    often = np.bincount(fixed.ravel(), minlength=len(store))
    expected = fixed.size / able
    return {
        "pairs": fixed.size,
        "each_number_once": sorted(n for numbers in drawn for n in numbers) == list(range(STEPS * BATCH * RANKS)),
        "volumes_with_partner": able,
        "strata_drawn": counts.shape[1],
        "draws_a_rank": {
            name: {"mean": counts[:, at].mean(), "max/mean": counts[:, at].max() / counts[:, at].mean()}
            for name, at in (("largest stratum", by_size[-1]), ("median stratum", by_size[len(by_size) // 2]))
        },
        "strata_chi2_per_dof": chi2(counts, counts.mean(0)) / ((RANKS - 1) * counts.shape[1]),
        "draws_a_volume": {"mean": expected, "max/mean": often.max() / expected},
        "volumes_chi2_per_dof": (chi2(often, expected) - (len(store) - able) * expected) / (able - 1),
    }


def chi2(counts: np.ndarray, expected: Any) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


def measure_bucket(folder: str, url: str, far: str) -> Facts:
    """A crop at a random place of the first volume of a store: mapped, behind URLs, and as zarr itself reads it."""
    import zarr

    store, random = Store(folder), np.random.default_rng(0)
    shape, volume = store.shape(0), f"volumes/{store.entries[0]['sha256'].decode()}"
    urls = {"file": f"file://{folder}-chunks", "http": url, "far": far}

    def start() -> list[int]:
        return [int(random.integers(0, n - edge + 1)) for n, edge in zip(shape, CROP, strict=True)]

    def crop(path: str) -> float:
        opened = Store(path)
        return 1e3 * median_seconds(lambda: opened.crop(0, start(), CROP), 40)

    def crop_by_zarr(path: str) -> float:
        array = zarr.open_array(f"{path}/{volume}", mode="r")
        return 1e3 * median_seconds(lambda: array[tuple(slice(a, a + n) for a, n in zip(start(), CROP))], 10)  # noqa: B905

    packed = sum(path.stat().st_size for path in Path(f"{folder}-chunks").rglob("c/0/0/0"))
    return {
        "bucket": {"mapped": {"ours_ms": crop(folder)}}
        | {name: {"ours_ms": crop(path), "zarr_ms": crop_by_zarr(path)} for name, path in urls.items()},
        "packed_share": packed / shard_path(Path(folder), 0).stat().st_size,
    }


@contextmanager
def served(folder: Path, delay_s: float) -> Iterator[str]:
    """The address of a server of these files, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.range_server", str(folder), str(delay_s)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            yield server.stdout.readline().strip()
        finally:
            server.kill()


def ct_like(shape: tuple[int, int, int], spacing_mm: float) -> np.ndarray:
    """Synthetic anatomy (D, H, W) in HU, enlarged fourfold, with noise of 20 HU."""
    small = tuple(-(-n // 4) for n in shape)
    hu = sample_subject(small, torch.Generator().manual_seed(0), (4 * spacing_mm,) * 3).hu.numpy().astype(np.float32)
    for axis in range(3):
        hu = hu.repeat(4, axis)
    hu = hu[tuple(map(slice, shape))]
    hu += 20 * np.random.default_rng(0).standard_normal(shape, np.float32)
    return hu.round().astype(np.int16)


def make_ct(path: Path) -> None:
    """512 x 512 x 400 voxels of 0.8 mm; gzip level 1."""
    image = nibabel.Nifti1Image(ct_like(CT_SHAPE[::-1], CT_MM).T, np.diag([CT_MM] * 3 + [1]))
    image.header.set_xyzt_units("mm")
    path.write_bytes(gzip.compress(image.to_bytes(), 1))


def measure_prepare(source: str, out: str, spacing_mm: str) -> Facts:
    """One CT to a store, by one thread as a worker has it."""
    import resource

    torch.set_num_threads(1)
    report = prepare_store(source, out, spacing_mm=float(spacing_mm))
    raw = int(np.prod(CT_SHAPE)) * VOXEL.itemsize / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    stored = shard_path(Path(out), 0).stat().st_size / 1e9
    return {"store_GB_a_scan": stored, "MB_a_second": raw / report.seconds, "peak_GB": peak}


def measure_gunzip(source: str) -> Facts:
    """The CT unpacked by Python's gzip and thrown away: what reading alone takes one core."""

    def unpack() -> None:
        with gzip.open(Path(source) / "ct.nii.gz") as file:
            while file.read(2**20):
                pass

    return {"gunzip_MB_a_second": int(np.prod(CT_SHAPE)) * VOXEL.itemsize / 1e6 / median_seconds(unpack, 5)}


def measure_processes(source: str, out: str) -> Facts:
    """Many CTs by one process and by two, start-up included."""
    torch.set_num_threads(1)
    (many := Path(out) / "many").mkdir(parents=True)
    for i in range(SCANS):
        (many / f"{i}.nii.gz").hardlink_to(Path(source) / "ct.nii.gz")
    seconds = {n: prepare_store(many, Path(out) / n, spacing_mm=2.0, workers=int(n)).seconds for n in ("1", "2")}
    return {"processes": {"scans": SCANS, "seconds": seconds}}


def measure_step() -> Facts:
    """A nano step on synthetic pairs, drawn in between, by one thread."""
    from gvsl_zoo.pretrain.loop import pretrain

    torch.set_num_threads(1)
    seconds: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        config = PretrainConfig(40, **PRESETS["nano"] | {"save_every": 41})
        pretrain(config, Path(folder), device="cpu", progress=lambda record: seconds.append(record["seconds"]))
    return {"nano_step_seconds": statistics.median(seconds[5:]), "nano_batch": config.batch_size}


def measure_synthetic() -> Facts:
    """A synthetic pair of the preset `small`, by one thread as a DataLoader worker has it."""
    torch.set_num_threads(1)
    source, generator = SyntheticPairs(CROP, SPACING_MM), torch.Generator().manual_seed(0)
    return {"synthetic_pair_seconds": median_seconds(lambda: source.pair(source.subjects(generator)), 10)}


MEASURES = {
    measure.__name__: measure
    for measure in (
        measure_index,
        measure_ranks,
        measure_bucket,
        measure_prepare,
        measure_gunzip,
        measure_processes,
        measure_step,
        measure_synthetic,
    )
}


def alone(measure: Any, *arguments: Any) -> Facts:
    """Its result from a new process."""
    command = [sys.executable, "-m", "benchmarks.scale", "--only", measure.__name__, *map(str, arguments)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def measure_urls(folder: Path) -> Facts:
    """`measure_bucket` of one volume as the CT has at 2 mm."""
    store = fabricate(folder / "one", 1)
    np.clip(ct_like(SHAPE, SPACING_MM), -1024, 1024).astype(VOXEL).tofile(shard_path(store, 0))
    index = np.load(store / "index.npy")
    index["offset"], index["sha256"] = 0, b"0123456789abcdef"
    np.save(store / "index.npy", index)
    upload_store(store, f"file://{store}-chunks")
    with served(folder, 0.0) as near, served(folder, FAR_S) as far:
        return alone(measure_bucket, store, f"{near}/one-chunks", f"{far}/one-chunks")


def measure_all() -> Facts:
    facts: Facts = {"index": {}, "ranks": {}, "prepare": {}}
    with tempfile.TemporaryDirectory() as folder:
        stores = {str(size): fabricate(Path(folder) / str(size), size) for size in SIZES}
        rounds = [{size: alone(measure_index, store) for size, store in stores.items()} for _ in range(5)]  # in turn
        for size, store in stores.items():
            values = [turn[size] for turn in rounds]
            facts["index"][size] = {name: statistics.median(v[name] for v in values) for name in values[0]}
            facts["ranks"][size] = alone(measure_ranks, store)
        facts |= measure_urls(Path(folder))
        (source := Path(folder) / "ct").mkdir()
        make_ct(source / "ct.nii.gz")
        facts["prepare_raw_MB"] = int(np.prod(CT_SHAPE)) * VOXEL.itemsize / 1e6
        facts["prepare_file_MB"] = (source / "ct.nii.gz").stat().st_size / 1e6
        for mm in SPACINGS_MM:
            facts["prepare"][str(mm)] = alone(measure_prepare, source, Path(folder) / f"{mm}mm", mm)
        facts |= alone(measure_gunzip, source) | alone(measure_processes, source, Path(folder) / "processes")
    return rounded(facts | alone(measure_step) | alone(measure_synthetic) | {"machine": machine()})


def rounded(facts: Any) -> Any:
    """Four significant digits are more than the machine repeats."""
    if isinstance(facts, dict):
        return {name: rounded(value) for name, value in facts.items()}
    return float(f"{facts:.4g}") if isinstance(facts, float) else facts


# --- The tables of docs/scaling.md ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Assumed:
    """What was not measured: a step's seconds at 96^3 on one device, and that more devices do not slow it down."""

    step_seconds: float = 0.05
    batch: int = 2
    steps: int = 200_000
    processes: tuple[int, ...] = (1, 16, 256)
    devices: tuple[int, ...] = (1, 8, 64)


def cost(scans: int, measured: Mapping[str, Any], assumed: Assumed) -> Facts:
    """Seconds, bytes and passes for so many scans; a pass is one pair a scan."""
    seconds = {mm: measured["prepare_raw_MB"] / at["MB_a_second"] for mm, at in measured["prepare"].items()}
    nano = measured["nano_step_seconds"] / measured["nano_batch"]  # a pair
    return {
        "store_GB": {mm: scans * at["store_GB_a_scan"] for mm, at in measured["prepare"].items()},
        "prepare_seconds": {n: -(-scans // n) * seconds["2"] for n in assumed.processes},
        "nano_pass_seconds": scans * nano,
        "pass_seconds": {n: -(-scans // (assumed.batch * n)) * assumed.step_seconds for n in assumed.devices},
        "passes": {n: assumed.steps * assumed.batch * n / scans for n in assumed.devices},
    }


def tables(measured: Mapping[str, Any], assumed: Assumed) -> dict[str, str]:
    """The page's tables by their marks."""
    costs = {int(size): cost(int(size), measured, assumed) for size in measured["index"]}
    devices, processes = assumed.devices, assumed.processes
    index = ["scans | open | own memory | mapped index | two volumes of a pair | with crops 96^3 | pickle | 64 ranks"]
    prepare = [" | ".join(["scans", *(f"store, {mm} mm" for mm in measured["prepare"])])]
    prepare[0] += "".join(f" | prepare at 2 mm, {plural(n, 'process', 'es')}{'*' if n > 1 else ''}" for n in processes)
    passes = ["one pass over | nano, this CPU" + "".join(f" | {plural(n, 'device')}*" for n in devices)]
    run = [f"{assumed.steps:,} steps over | nano, this CPU" + "".join(f" | {plural(n, 'device')}*" for n in devices)]
    for size, c in costs.items():
        at, ranks = measured["index"][str(size)], measured["ranks"][str(size)]
        even = f"{ranks['strata_chi2_per_dof']:.2f}" if ranks["each_number_once"] else "FAILS"
        index.append(
            f"{size:,} | {at['open_seconds'] * 1e3:.3g} ms | {at['own_MB']:.1f} MB | {at['shared_MB']:.1f} MB | "
            f"{at['indices_us']:.0f} us | {at['pair_us'] / 1e3:.1f} ms | {at['pickle_bytes'] / 1e3:,.1f} kB | {even}"
        )
        sizes, spans = map(amount, c["store_GB"].values()), map(span, c["prepare_seconds"].values())
        prepare.append(" | ".join([f"{size:,}", *sizes, *spans]))
        passes.append(" | ".join([f"{size:,}", *map(span, [c["nano_pass_seconds"], *c["pass_seconds"].values()])]))
        nano = assumed.steps * measured["nano_batch"] / size
        run.append(
            " | ".join(
                [
                    f"{size:,}",
                    *(f"{n:,.0f} passes" if n >= 10 else f"{n:.2g} passes" for n in [nano, *c["passes"].values()]),
                ]
            )
        )
    hours = [assumed.steps * measured["nano_step_seconds"], *[assumed.steps * assumed.step_seconds] * len(devices)]
    run.append(" | ".join(["take", *map(span, hours)]))
    rows = {"index": index, "prepare": prepare, "pass": passes, "run": run}
    written = {name: "\n".join(f"| {row} |" for row in [r[0], ruler(r[0]), *r[1:]]) for name, r in rows.items()}
    return written | {"bucket": bucket_table(measured)} | sentences(measured, assumed)


def bucket_table(measured: Mapping[str, Any]) -> str:
    """What a crop takes from where."""
    places = {
        "mapped": "a folder, mapped",
        "file": "`file://`, chunks",
        "http": "`http://` on this machine, chunks",
        "far": f"the same, {1e3 * FAR_S:.0f} ms an answer",
    }
    rows = ["a crop of 96^3 from | takes | as zarr reads it"]
    for name, place in places.items():
        at = measured["bucket"][name]
        rows.append(" | ".join([place, *(f"{at[k]:.3g} ms" if k in at else "-" for k in ("ours_ms", "zarr_ms"))]))
    return "\n".join(f"| {row} |" for row in [rows[0], ruler(rows[0]), *rows[1:]])


def sentences(measured: Mapping[str, Any], assumed: Assumed) -> dict[str, str]:
    """What the page says beside its tables."""
    scans, synthetic = list(measured["index"].values())[-1]["pair_us"] / 1e6, measured["synthetic_pair_seconds"]
    at, step = measured["prepare"]["2"], assumed.step_seconds
    mixed, alone = workers((scans + synthetic) / 2, assumed), workers(scans, assumed)
    raw, packed, many = measured["prepare_raw_MB"], measured["prepare_file_MB"], measured["processes"]
    one, two = many["seconds"].values()
    return {
        "feed": f"A pair of 96^3 takes a worker {1e3 * scans:.1f} ms from scans in memory, {1e3 * synthetic:.0f} ms "
        f"from synthetic anatomy. Half of each\nneed {plural(mixed, 'worker')} for "
        f"a device of {1e3 * step:.0f} ms a step*, scans alone {alone}.",
        "speed": f"{at['MB_a_second']:.0f} MB of voxels a second and process; the CT has {raw:.0f} MB, its file "
        f"{packed:.0f} MB. Peak memory: {at['peak_GB']:.1f} GB a process.\nPython's gzip alone unpacks the file at "
        f"{measured['gunzip_MB_a_second']:.0f} MB a second. {many['scans']} such files take one process "
        f"{span(one)}, two {span(two)}: x{one / two:.2f}.",
        "packed": f"The chunks have {100 * measured['packed_share']:.0f} % of the bytes of the folder.",
    }


def workers(pair_seconds: float, assumed: Assumed) -> int:
    """DataLoader workers that keep one device busy."""
    return math.ceil(assumed.batch * pair_seconds / assumed.step_seconds)


def ruler(header: str) -> str:
    return " | ".join(["---"] * (header.count("|") + 1))


def plural(count: int, name: str, ending: str = "s") -> str:
    return f"{count} {name}{'' if count == 1 else ending}"


def span(seconds: float) -> str:
    """42 s, 12 min, 6.9 h, 38 days."""
    for size, unit in ((1, "s"), (60, "min"), (3600, "h")):
        if seconds < 100 * size:
            return f"{seconds / size:.2g} {unit}"
    return f"{seconds / 86400:,.0f} days"


def amount(GB: float) -> str:
    return f"{GB:.2g} GB" if GB < 100 else f"{GB:.0f} GB" if GB < 1000 else f"{GB / 1000:.3g} TB"


def with_tables(page: str, measured: Mapping[str, Any]) -> str:
    """The page with its tables written anew."""
    for name, table in tables(measured, Assumed()).items():
        pattern = rf"(<!-- {name}: [^>]*-->\n).*?(<!-- /{name} -->)"
        page, count = re.subn(pattern, lambda m, t=table: f"{m[1]}{t}\n{m[2]}", page, flags=re.DOTALL)
        assert count == 1, f"{PAGE} lacks the marks of the table {name!r}"
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="measure nothing; write the page's tables")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="one measurement, in this process")
    options = parser.parse_args()
    if options.only:
        print(json.dumps(MEASURES[options.only[0]](*options.only[1:])))
        return
    if not options.table:
        (RESULTS / "scale.json").write_text(json.dumps(measure_all(), indent=2) + "\n")
    measured = json.loads((RESULTS / "scale.json").read_text())
    if options.table:
        PAGE.write_text(with_tables(PAGE.read_text(), measured))
    print("\n\n".join(tables(measured, Assumed()).values()))


if __name__ == "__main__":
    main()
