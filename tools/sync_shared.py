"""Copies the shared blocks of one script to every other file that has them.

python tools/sync_shared.py cgan.py    # cgan.py's are the truth; infogan.py's where none is named
python tools/sync_shared.py --check    # writes nothing; exit code 1 where blocks differ
"""

import argparse
import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"^# --- shared: (\w+) ---\n(.*?)^# --- end shared ---\n", re.S | re.M)
EVALUATE = (ROOT / "evaluate.py").read_text(encoding="utf-8")
FILES = sorted(path.name for path in ROOT.glob("*.py"))
SCRIPTS = ast.literal_eval(re.search(r"^SCRIPTS = (.*)", EVALUATE, re.M)[1])  # the one list


def sync(first="infogan.py", check=False):
    """The differences, as lines; each block is as in the first file that has it."""
    texts = {name: (ROOT / name).read_text(encoding="utf-8") for name in [first, *FILES]}
    for name, text in texts.items():  # a lost marker would spread
        whole, ends = len(BLOCK.findall(text)), len(re.findall(r"^# --- end shared", text, re.M))
        if not whole == ends == len(re.findall(r"^# --- shared", text, re.M)):
            sys.exit(f"{name}: each '# --- shared: NAME ---' needs its '# --- end shared ---'")
    blocks, differences = {}, []
    for name, before in texts.items():
        text = before
        for block in BLOCK.finditer(before):
            source, wanted = blocks.setdefault(block[1], (name, block[0]))
            if block[0] != wanted:
                differences.append(f"block {block[1]}: {name} differs from {source}")
                text = text.replace(block[0], wanted)
        if text != before and not check:
            (ROOT / name).write_text(text, encoding="utf-8")
    return differences


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", nargs="?", default="infogan.py", choices=FILES, metavar="FILE")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1")
    args = parser.parse_args()
    differences = sync(args.file, args.check)
    print(*differences, sep="\n", end="\n" * bool(differences))
    if differences and args.check:
        sys.exit("python tools/sync_shared.py FILE copies the blocks of FILE to the others")
