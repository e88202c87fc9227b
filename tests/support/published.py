"""随书模型公布的测量结果，以及换种子重新量时至少该达到多少。"""

import json

from support.paths import ROOT


def evaluation(name: str) -> dict:
    """模型 name 的 evaluation.json。"""
    return json.loads((ROOT / "models" / name / "evaluation.json").read_text(encoding="utf-8"))


def allowed(published: float, count: int) -> float:
    """count 次里至少该有多大比例：公布的比例减三倍标准误差，再减一次。"""
    return published - 3 * (published * (1 - published) / count) ** 0.5 - 1 / count
