"""Run the corpus, or the cases whose id holds one of the words given, and print what fails.

    python tests/corpus/run.py [--area AREA] [--write FOLDER] [--tiny FOLDER] [WORD...]

--write puts the failing cases, with their actual output, into FOLDER/failing-{config,input,ckpt,options}.md.
"""

import argparse
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import corpus  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("words", nargs="*")
    parser.add_argument("--write", type=Path)
    parser.add_argument("--area", choices=corpus.AREAS, action="append")
    parser.add_argument("--tiny", type=Path, default=Path(tempfile.gettempdir()) / "corpus-tiny")
    parser.add_argument("--at-once", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="corpus-") as folder:
        bench = corpus.Bench(Path(folder), args.tiny)
        failing: dict[str, list[str]] = {area: [] for area in corpus.AREAS}
        counts = dict.fromkeys(corpus.AREAS, 0)
        started = time.monotonic()
        with ThreadPoolExecutor(args.at_once) as pool:
            chosen = [
                (area, case)
                for area, cases in corpus.AREAS.items()
                for case in cases
                if area in (args.area or corpus.AREAS)
                and (not args.words or any(word in case.id for word in args.words))
            ]
            for (area, case), (outcome, wrong) in zip(
                chosen, pool.map(lambda item: bench.judge(item[1]), chosen), strict=True
            ):
                counts[area] += 1
                if wrong:
                    failing[area].append(corpus.describe(case, outcome, wrong))
                    print(failing[area][-1], flush=True)
                elif args.words:
                    print(f"ok {case.id} {outcome.seconds} s: {(outcome.err.strip() or outcome.out.strip()[-300:])}")
        print("\n".join(f"written elsewhere: {path}" for path in bench.strays()))
        bench.close()
        for area, texts in failing.items():
            print(f"{area}: {len(texts)} of {counts[area]} fail")
            if args.write and counts[area]:
                head = f"# {area}: {len(texts)} of {counts[area]} cases fail ({time.strftime('%H:%M')})\n\n"
                (args.write / f"failing-{area}.md").write_text(head + "\n".join(texts))
        print(f"{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
