"""术语表与符号表：条目齐全、写法一致，各章第一次加粗的术语链接到术语表。"""

import re
from dataclasses import dataclass

import pytest
import yaml
from support.paths import ROOT
from support.prose import CHAPTERS, PAGES, normalize, numbered_sections, prose_lines

TOC = yaml.safe_load((ROOT / "tests/text/toc.yml").read_text("utf-8"))
SECTION = re.compile(r"\{sec\}`([^`]+)`")
# 只有西文名的：产品、方法的名字，没有通行的译名
WITHOUT_CHINESE = {"UNet", "DiT", "DreamBooth", "ControlNet", "Stable Diffusion", "CLIP", "FID", "Hugging Face Hub",
                   "Hugging Face Space", "safetensors"}
# 别处的译法，全书不用；引号里是在说这个词本身
OTHER_NAMES = ["隐空间", "潜在空间", "隐变量", "潜在变量", "潜在扩散", "隐扩散", "得分函数", "噪声调度", "噪声表", "祖先抽样",
               "跳跃链接", "无分类引导", "负向提示", "反向提示词", "交叉关注", "自关注", "证据下界", "文字编码器", "标识符",
               "前向过程", "损坏过程", "加噪过程", "噪声日程", "噪声安排", "排程器"]
# 从模型里得到样本叫采样；统计的意思才叫抽样：抽样误差、抽样本，“……是抽样”说的是量出来的数
STATISTICAL = re.compile(r"(?<!是)抽样(?!误差|本|检验)")


@dataclass
class Entry:
    names: list[str]
    definition: str
    places: list[str]       # 讲到它的章节
    group: str


def entries() -> list[Entry]:
    found, group = [], ""
    for part in re.split(r"^(## .+)$", (ROOT / "glossary.md").read_text("utf-8"), flags=re.M):
        if part.startswith("## "):
            group = part[3:]
            continue
        for block in re.findall(r"^```\{glossary\}\n(.*?)^```$", part, flags=re.M | re.S):
            for item in re.split(r"\n\n(?=\S)", block.strip("\n")):
                lines = item.split("\n")
                names = [line for line in lines if line and not line.startswith(" ")]
                body = [line.strip() for line in lines if line.startswith(" ")]
                assert len(body) == 2 and lines[-2] == "", f"{names}：应是一行释义、一个空行、一行“见……”"
                assert re.fullmatch(r"见 (\{sec\}`[^`]+`、?)+。", body[1]), body[1]
                found.append(Entry(names, body[0], SECTION.findall(body[1]), group))
    return found


ENTRIES = entries()
NAMES = [name for entry in ENTRIES for name in entry.names]
each_entry = pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.names[0])


def test_documented_terms_come_first():
    """七个基本词用的正是规定的说法，单独排在最前面。"""
    first = [entry for entry in ENTRIES if entry.group == ENTRIES[0].group]
    assert [entry.names for entry in first] == [[term["zh"], term["en"]] for term in TOC["glossary"]]


def test_there_are_enough_terms_and_no_duplicates():
    assert len(ENTRIES) >= 67
    same = [name.casefold() for name in NAMES]
    assert sorted({name for name in same if same.count(name) > 1}) == []
    definitions = [entry.definition for entry in ENTRIES]
    assert len(set(definitions)) == len(definitions)


@each_entry
def test_entry_is_complete_and_short(entry):
    has_chinese = [bool(re.search(r"[\u4e00-\u9fff]", name)) for name in entry.names]
    if entry.names[0] not in WITHOUT_CHINESE:
        assert has_chinese[0] and len(entry.names) >= 2, "要有中文名和英文名，中文名在前"
    assert not any(has_chinese[1:]), "中文名只有一个"
    words = re.sub(r"\$[^$]*\$", "", entry.definition)
    assert entry.definition.endswith("。") and words.count("。") <= 2
    assert 8 <= len(words) <= 80, len(words)
    assert not re.search(r"\{\w+\}`", entry.definition), "释义也用在弹出的小框里，只能有文字和公式"


@pytest.mark.parametrize("page", ["glossary.md", "index.md"])
def test_sections_exist(page):
    """提到的章节：那一章写好了，就要真有这一节；没有写，也要在目录里。"""
    chapters = {normalize(chapter["title"]): chapter for part in TOC["parts"] for chapter in part["chapters"]}
    written = {normalize(found[0][1]): found for found in PAGES.values() if found}
    for place in SECTION.findall((ROOT / page).read_text("utf-8")):
        number = re.match(r"第.章|[\d.]+", place)
        if number is None:
            assert place.startswith("附录"), place
            continue
        position = "一二三四五六七八九".index(number[0][1]) + 1 if place[0] == "第" else int(number[0].split(".")[0])
        title, chapter = list(chapters.items())[position - 1]
        if place[0] == "第":
            continue
        if title in written:
            assert any(heading.startswith(f"{number[0]} ") for _, heading, _ in written[title]), place
        else:
            listed = [section.split()[0] for section in chapter["sections"]]
            # 目录只列到节；还没有写的第一章，小节以后再核对
            assert any(number[0] == s or (number[0].startswith(f"{s}.") and position == 1) for s in listed), place


def test_terms_occur_where_the_glossary_says():
    """条目指的每一节，正文里真的有这个词：中文名、英文名、缩写，或释义里写明的简称。"""
    sections = {number: "\n".join(prose_lines(body)).casefold() for number, body in numbered_sections().items()}
    missing = []
    for entry in ENTRIES:
        names = [name.casefold() for name in entry.names + re.findall("简称“([^”]+)”", entry.definition)]
        for place in entry.places:
            number = re.match(r"第.章|[\d.]+", place)[0]
            if number in sections and not any(name in sections[number] for name in names):
                missing.append(f"{entry.names[0]} 不在 {place}")
    assert missing == []


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_first_bold_mention_links_to_the_glossary(path):
    """一章里第一次加粗的术语写成 {newterm}`术语`，或 {newterm}`显示的字 <术语>`。"""
    text = "\n".join(prose_lines(path.read_text("utf-8")))
    wrong = []
    for name in NAMES:
        plain = text.find(f"**{name}**")
        linked = re.search(rf"\{{newterm\}}`(?:{re.escape(name)}|[^`]*<{re.escape(name)}>)`", text)
        if plain >= 0 and (linked is None or plain < linked.start()):
            wrong.append(f"{name}（第 {text[:plain].count(chr(10)) + 1} 行）")
    assert wrong == [], "请写成 {newterm}`术语`"


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_term_roles_are_not_inside_stars(path):
    """**{term}`术语`** 前面紧挨着汉字时，星号会原样印出来。"""
    assert re.findall(r"\*\*\{term\}`[^`]+`", path.read_text("utf-8")) == []


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_terms_have_one_translation(path):
    text = re.sub(r"“[^”]*”", "", "\n".join(prose_lines(path.read_text("utf-8"))))
    assert [word for word in OTHER_NAMES if word in text] == []
    assert [text[max(0, m.start() - 10): m.end() + 10] for m in STATISTICAL.finditer(text)] == [], "从模型里得到样本叫采样"


# —— 符号表 ——

NOTATION = (ROOT / "notation.md").read_text("utf-8")


def test_notation_tables_are_narrow():
    """手机上放得下：每张表三列。"""
    rows = [line for line in NOTATION.split("\n") if line.startswith("|")]
    assert len(rows) > 40
    assert {len(re.sub(r"\$[^$]*\$", "", row).strip("|").split("|")) for row in rows} == {3}


def test_scheduler_names_in_notation_exist():
    """符号表里写的 diffusers 的名字真的在，含义也对。"""
    import torch
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(num_train_timesteps=1000)
    for name in ("betas", "alphas", "alphas_cumprod"):
        assert f"`{name}`" in NOTATION and getattr(scheduler, name).shape == (1000,)
    assert torch.allclose(scheduler.alphas, 1 - scheduler.betas)
    assert torch.allclose(scheduler.alphas_cumprod, scheduler.alphas.cumprod(dim=0))
    assert "`config.num_train_timesteps`" in NOTATION and scheduler.config.num_train_timesteps == 1000
    x0, noise, t = torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4), torch.tensor([3, 700])
    a = scheduler.alphas_cumprod[t].view(2, 1, 1, 1)
    assert torch.allclose(scheduler.add_noise(x0, noise, t), a.sqrt() * x0 + (1 - a).sqrt() * noise, atol=1e-6)
    assert torch.allclose(scheduler.get_velocity(x0, noise, t), a.sqrt() * noise - (1 - a).sqrt() * x0, atol=1e-6)
