"""Cells without torch, imported in workers by file path; the context scripts what goes wrong where."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from dpguard.study.grid import describe
from dpguard.study.record import Record, TextRow


def execute(cell, context):
    _note(context, f"{cell.id} {os.getpid()}")
    deed = context.get("script", {}).get(describe(cell), "")
    time.sleep(context.get("seconds", 0))
    if deed == "raise":
        raise ValueError("a deliberate\nfailure")
    if deed == "kill":
        print("last words", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    if deed == "exit":
        sys.exit(3)
    if deed == "skip":
        return Record(cell, "skipped", "needs the federation"), []
    if deed == "nan":
        return Record(cell, "done", result={"loss": float("nan")}), []
    if deed == "big":
        return Record(cell, "done", result={"noise": "x" * 3_000_000}), []
    if deed == "big-random":
        return Record(cell, "done", result={"noise": os.urandom(1_000_000).hex()}), []
    if deed == "sleep":
        print("about to sleep", flush=True)
        time.sleep(600)
    if deed == "eat":
        helper = subprocess.Popen(["sleep", "600"], start_new_session=True)
        Path(context["pids"]).write_text(f"{os.getpid()} {helper.pid}")
        eaten = bytearray(os.urandom(1000)) * 1_700_000
        time.sleep(600)
        del eaten
    if deed == "wait":
        while not Path(context["gate"]).exists():
            time.sleep(0.02)
    score = int(cell.id[:6], 16) / 16**6
    result = {"score": score, "device": os.environ.get("CUDA_VISIBLE_DEVICES"), "told": context.get("device")}
    return Record(cell, "done", result=result), [TextRow(0, "truth", f"text of {cell.id}")]


def _note(context, words):
    if "log" in context:
        with open(context["log"], "a", encoding="utf-8") as log:
            log.write(words + "\n")
