"""What a table on disk costs a server, with few of its rows in memory: loss by how many reads miss them.

    python benchmarks/serving_disk.py --directory FOLDER --tokens tokens.npy --out serving_disk.json

Batches of real text (or of words drawn by Zipf's law, without `--tokens`) take turns on a dense backbone
with random weights, the module in its second block: prefilled in chunks, whose rows are asked for some chunks
ahead, and continued token by token, whose rows are read during the others' steps. Chunks grow and shrink
again: the first one's rows are there soon, and little is left to compute when the last ones have been read.
The first chunk of the next text is looked up during the last steps of decoding: a server knows what waits.
Rows are read around the page cache; a sixteenth of them may be kept in memory. One way reads a small table on
the device, the other the file, in turn, on the same text and in the same batches:

    cold        the first text; no row is in memory
    new text    the following ones, each read once
    again       the last text, repeated

Where more rows are missing than the disk can read meanwhile, the disk is the limit: `bound` is the time of
the small table, or that of the reads alone, whichever is longer. A disk's speed changes from second to
second; that of the reads alone is therefore measured right after the text, by as many look-ups of as many
rows as its prompts asked for, as far from each other, from another place of the file. Texts after the cold
one are also told apart by whether the disk can follow: fewer reads are asked for than it does alone.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from serving_backbone import SHAPES, Backbone, Batch, Prompt
from serving_measure import BOTH, Runner, check, losses
from serving_tables import SMALL, add_table_options, build_memory, engram, fill, layout_of, random_records

from engram_lab.files import write_atomically
from engram_lab.memory.disk import DiskStore
from engram_lab.memory.disk_copy import BLOCK
from engram_lab.memory.layout import RecordLayout
from engram_lab.memory.lookup import DISK_THREADS
from engram_lab.memory.stores import DeviceStore
from engram_lab.memory.stores import fill as fill_rows
from engram_lab.model.generation import IN_TURN_BY_THREADS
from engram_lab.model.hashing import table_rows

FINGERPRINT = "serving benchmark"
WAYS = ("small", "disk")
BURST, BURSTS = 600, 20
"""Rows of a step of decoding that are not in memory, about; times that the disk is measured with as many."""
READ_QUANTILES = (0.5, 0.9, 0.99, 1.0)
"""Of the time a look-up takes to read: a late one holds the batch up."""


def make_table(path: Path, layout: RecordLayout, rows: int) -> float | None:
    """Write a file of random rows unless it is there; return the seconds."""
    if any(path.parent.glob(f"{path.name}.written-*")):
        return None
    block = random_records(layout, 1 << 17)

    def initial(first: int, count: int, out: torch.Tensor) -> None:
        out.copy_(block[(torch.arange(count) + first) % len(block)])

    began = time.perf_counter()
    store = DiskStore(path, layout, rows, FINGERPRINT, cache_rows=0)
    try:
        fill_rows(store, initial)
        store.sync()
        store.mark("filled")
    finally:
        store.close()
    return time.perf_counter() - began


class Recorded(DiskStore):
    """Remembers what it reads from the file.

    Attributes:
        from_file: the rows of each look-up.
        seconds: that each took to read.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.from_file: list[np.ndarray] = []
        self.seconds: list[float] = []

    def _read_file(self, ids: np.ndarray, out: torch.Tensor, places: np.ndarray) -> None:
        began = time.perf_counter()
        super()._read_file(ids, out, places)
        self.seconds.append(time.perf_counter() - began)
        self.from_file.append(ids)


class Alone:
    """Reads of the file's rows with nothing beside them and nothing kept in memory."""

    def __init__(self, path: Path, layout: RecordLayout, rows: int) -> None:
        self.store = DiskStore(path, layout, rows, FINGERPRINT, writable=False, cache_rows=0)
        self.store.read(torch.arange(64), torch.empty(64, layout.record_bytes, dtype=torch.uint8))  # compiles

    def speed(self, look_ups: list[np.ndarray]) -> float | None:
        """Return reads per second, as `reads_done` counts them, of such look-ups elsewhere."""
        shift = int(torch.randint(self.store.rows, ()))
        ids = [torch.from_numpy((rows + shift) % self.store.rows) for rows in look_ups]
        outs = [torch.zeros(len(rows), self.store.record_bytes, dtype=torch.uint8) for rows in ids]
        done, began = reads_done(self.store), time.perf_counter()
        with ThreadPoolExecutor(DISK_THREADS) as threads:
            list(threads.map(self.store.read, ids, outs))
        reads = reads_done(self.store) - done
        return reads / (time.perf_counter() - began) if reads else None


def reads_done(store: DiskStore) -> int:
    """Return how many blocks this process has read from a disk: those with several rows count once.

    Where the system does not say, how many rows were not in memory.
    """
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return store.reads - store.hits
    return int(dict(line.split(": ") for line in lines)["read_bytes"]) // BLOCK


Text = tuple[list[list[Prompt]], list[torch.Tensor]]
"""The prompts of every batch, in chunks, and the ids [new + 1, B] that continue each batch."""


class Texts:
    """Texts that follow each other: prompts for every batch, and what continues them.

    Prompts of all texts have the same lengths, so that none meets a shape for the first time.
    """

    def __init__(self, options: argparse.Namespace, vocab: int, device: torch.device) -> None:
        self.options, self.device = options, device
        if options.tokens is not None:
            self.tokens = np.load(options.tokens, mmap_mode="r")
            assert int(self.tokens.max()) < vocab, "the ids are those of a larger vocabulary"
        else:
            weights = 1.0 / np.arange(1, vocab)
            draw = np.random.default_rng(1)
            self.tokens = 1 + draw.choice(vocab - 1, options.drawn, p=weights / weights.sum())
        draw, count = np.random.default_rng(0), options.batch // options.chunk
        lengths = np.sort(draw.integers(options.shortest, options.longest + 1, (options.turns, count)))
        self._lengths = np.concatenate([lengths[:, ::2], lengths[:, 1::2][:, ::-1]], axis=1)
        self._at = 0

    def next(self) -> Text:
        """Return every batch's prompts, and the ids [new + 1, B] that follow them."""
        options = self.options
        prompts: list[list[Prompt]] = []
        coming = []
        for lengths in self._lengths:
            chunks, after = [], []
            for length in lengths:
                wide = length + options.new + 1
                here = self._take(options.chunk * wide).reshape(options.chunk, wide)
                text = np.ascontiguousarray(here[:, :length])
                chunks.append(Prompt(torch.from_numpy(text).to(self.device), text))
                after.append(here[:, length:])
            prompts.append(chunks)
            coming.append(torch.from_numpy(np.concatenate(after).T.copy()).to(self.device))
        return prompts, coming

    def _take(self, count: int) -> np.ndarray:
        if self._at + count > len(self.tokens):
            raise SystemExit("the text is over: give a longer one, or fewer --pairs")
        self._at += count
        return np.asarray(self.tokens[self._at - count : self._at], dtype=np.int64)


def measure(
    runner: Runner,
    store: Recorded,
    alone: Alone,
    text: Text,
    following: Text | None,
    turn: int,
    steps: int,
) -> dict[str, Any]:
    """Serve one text both ways, and begin the one that follows; `turn` says which way is first."""
    prompts, coming = text
    pair: dict[str, Any] = {}
    rows: dict[str, Any] = {}
    for way in WAYS if turn % 2 == 0 else WAYS[::-1]:
        taken = {}
        for part in BOTH:
            reads, hits, done = store.reads, store.hits, reads_done(store)
            store.from_file.clear()
            store.seconds.clear()
            if part == "prefill":
                taken[part] = runner.prefill(way, prompts)
            else:
                taken[part] = runner.decode(way, coming, steps, following and following[0][0])
            if way == "disk":
                asked, found = store.reads - reads, store.hits - hits
                rows[part] = {
                    "rows": asked,
                    "hit_rate": found / asked,
                    "missing": asked - found,
                    "reads": reads_done(store) - done,
                    "read_seconds": np.quantile(store.seconds or [0.0], READ_QUANTILES).tolist(),
                }
                if part == "prefill":
                    look_ups = store.from_file.copy()
        pair[way] = taken
        if way == "disk":
            pair["disk_reads_per_second"] = alone.speed(look_ups)
    pair["rows"] = rows
    for part in BOTH:
        rows[part]["reads_per_second"] = rows[part]["reads"] / pair["small"][part]
    return pair


def summarise(pairs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return losses and reads by what was served, and of warm texts by whether the disk could follow."""
    groups: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for pair in pairs:
        speed = pair["disk_reads_per_second"]
        pair["bound"] = {}
        for part in BOTH:
            rows, small = pair["rows"][part], pair["small"][part]
            needed = rows["reads"] / speed if speed else 0.0
            pair["bound"][part] = max(small, needed)
            followed = "the disk can follow" if needed < small else "the disk cannot follow"
            for name in (pair["regime"], *([followed] if pair["regime"] != "cold" else [])):
                groups.setdefault(name, {}).setdefault(part, []).append(pair)
    return {
        name: {
            part: {
                "hit_rate": float(np.mean([pair["rows"][part]["hit_rate"] for pair in mine])),
                "reads_per_second_asked": float(
                    np.mean([pair["rows"][part]["reads_per_second"] for pair in mine])
                ),
                "loss": losses(mine, "small", "disk", (part,)),
                "loss_against_bound": losses(mine, "bound", "disk", (part,)),
            }
            for part, mine in parts.items()
        }
        for name, parts in groups.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("serving_disk.json"))
    parser.add_argument("--directory", type=Path, required=True, help="on the disk that is measured")
    parser.add_argument("--make-only", action="store_true", help="write the table's file and end")
    parser.add_argument("--backbone", default="8B", choices=list(SHAPES))
    add_table_options(parser, 4e9)
    parser.add_argument("--kept", type=float, default=1 / 16, help="share of the rows that memory may keep")
    parser.add_argument("--tokens", type=Path, help="ids of a text, one-dimensional, as numpy saves them")
    parser.add_argument("--drawn", type=int, default=4_000_000, help="tokens drawn without --tokens")
    parser.add_argument("--pairs", type=int, default=6, help="texts, the cold one included")
    parser.add_argument("--again", type=int, default=4, help="repetitions of the last text")
    parser.add_argument("--seconds", type=float, default=120, help="after which no text is begun")
    parser.add_argument("--batch", type=int, default=64, help="sequences of each batch")
    parser.add_argument("--turns", type=int, default=IN_TURN_BY_THREADS, help="batches that take turns")
    parser.add_argument("--chunk", type=int, default=16, help="sequences prefilled at once")
    parser.add_argument("--shortest", type=int, default=100)
    parser.add_argument("--longest", type=int, default=512)
    parser.add_argument("--new", type=int, default=64, help="tokens decoded per sequence")
    parser.add_argument("--rehearse", action="store_true", help="toy sizes, on a CPU, in seconds")
    options = parser.parse_args()
    if options.rehearse:
        options.backbone, options.parameters = "tiny", 400_000
        options.batch, options.chunk, options.new, options.drawn = 4, 2, 5, 4_000
        options.shortest, options.longest, options.pairs, options.again = 6, 20, 3, 2
    torch.set_num_threads(1)  # the table's threads are its own
    device = torch.device("cpu" if options.rehearse or not torch.cuda.is_available() else "cuda:0")
    layout, config = layout_of(options), engram(options, options.parameters)
    (rows,) = table_rows(config)
    path = options.directory / f"serving-{rows}.table"
    written = make_table(path, layout, rows)
    if options.make_only:
        print(f"{path}: {rows * layout.record_bytes / 1e9:.2f} GB written in {written} s")
        return
    alone = Alone(path, layout, rows)
    bursts = [alone.speed([np.random.default_rng(n).integers(0, rows, BURST)]) for n in range(BURSTS)]
    store = Recorded(
        path,
        layout,
        rows,
        FINGERPRINT,
        writable=False,
        cache_rows=int(options.kept * rows),
    )
    results: dict[str, Any] = {
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor(),
        "torch": torch.__version__,
        "options": {name: str(value) for name, value in vars(options).items()},
        "table_rows": rows,
        "table_bytes": rows * layout.record_bytes,
        "rows_in_memory": int(options.kept * rows),
        "seconds_to_write": written,
        "disk_reads_per_second_in_bursts": bursts,
    }
    print(json.dumps(results, indent=1), flush=True)
    with torch.no_grad():
        small_config = engram(options, min(options.parameters / 2, SMALL))
        small = DeviceStore(table_rows(small_config)[0], layout.record_bytes, device)
        fill(small, layout, 1)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        longest, heads = options.longest + options.new + 8, 2 * options.heads
        backbone = Backbone(SHAPES[options.backbone], longest, device, dtype)
        batches = [
            Batch(backbone, options.batch, longest, options.new + 8, heads, options.row_dim)
            for _ in range(options.turns)
        ]
        memories = {
            "small": build_memory(small_config, small, layout, backbone, far=False, few=0),
            "disk": build_memory(config, store, layout, backbone, far=True, few=0),
        }
        error = check(backbone, batches[0], memories["disk"], options.shortest, ahead=True)
        print(f"decoding equals prefill to {error}", flush=True)
        for batch in batches:
            batch.lengths.fill_(options.shortest)
            batch.step.zero_()
        runner = Runner(backbone, {**memories}, batches, ahead=("disk",))
        texts = Texts(options, backbone.shape.vocab, device)
        warm = texts.next()
        for _ in range(2):  # the small table meets all shapes; the file's rows are left alone
            runner.prefill("small", warm[0])
            runner.decode("small", warm[1], options.new)
        pairs: list[dict[str, Any]] = []
        began = time.perf_counter()
        text = texts.next()
        for number in range(options.pairs + options.again):
            if time.perf_counter() - began > options.seconds and number > 1:
                print(f"stopped before text {number}: {options.seconds:.0f} s are over", flush=True)
                break
            following = texts.next() if number + 1 < options.pairs else text
            regime = "cold" if number == 0 else "new text" if number < options.pairs else "again"
            pairs.append(
                {"regime": regime, **measure(runner, store, alone, text, following, number, options.new)}
            )
            text = following
            print(json.dumps(pairs[-1]), flush=True)
            summary = summarise(pairs)
            results |= {"decode_error": error, "pairs": pairs, "summary": summary}
            write_atomically(options.out, json.dumps(results, indent=1) + "\n")
        runner.close()
    store.close()
    alone.store.close()
    print(json.dumps(results["summary"], indent=1))


if __name__ == "__main__":
    main()
