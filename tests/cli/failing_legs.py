"""Runs cells as the product does, but one of them always falls over."""

from dpguard.study import legs


def execute(cell, context):
    if cell.leg == "utility" and cell.policy == "none":
        raise RuntimeError("the moon was in the way")
    return legs.execute(cell, context)
