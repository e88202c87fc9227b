"""GitHub 上的工作流：能解析，只用官方的动作和本仓库有的命令，权限最小，不用任何密钥。"""

import re

import pytest
import yaml
from support.paths import ROOT

FILES = sorted((ROOT / ".github/workflows").glob("*.yml"))


@pytest.fixture(params=FILES, ids=lambda path: path.name)
def workflow(request):
    return yaml.safe_load(request.param.read_text("utf-8"))


def steps(workflow) -> list[dict]:
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


def test_there_is_a_workflow():
    assert FILES, ".github/workflows 里没有工作流"


def test_jobs_are_complete(workflow):
    """每个任务都有机器和步骤；needs 指的任务都在。"""
    for name, job in workflow["jobs"].items():
        assert job["runs-on"].startswith("ubuntu-") and job["runs-on"] != "ubuntu-latest", f"{name}：写明系统的版本"
        assert all(("run" in step) != ("uses" in step) for step in job["steps"]), name
        assert job.get("needs", name) in workflow["jobs"]


def test_actions_are_official_and_pinned(workflow):
    used = [step["uses"] for step in steps(workflow) if "uses" in step]
    assert [action for action in used if not re.fullmatch(r"actions/[a-z-]+@v\d+", action)] == []


def test_commands_exist(workflow):
    """run 里的命令是 make 的目标或仓库里的脚本；系统自带的只有 mkdir 和 touch。"""
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    for command in (c for step in steps(workflow) for c in re.split(r"\n|&&", step.get("run", "")) if c.strip()):
        program, *arguments = command.split()
        if program == "make":
            assert arguments and set(arguments) <= set(targets), f"Makefile 里没有这个目标：{command}"
        elif program not in ("mkdir", "touch"):
            assert (ROOT / program).is_file() and (ROOT / program).stat().st_mode & 0o100, f"不能运行：{command}"


def triggers(workflow) -> dict:
    """何时运行；YAML 1.1 把键 on 读成 True。"""
    return workflow[True]


def test_every_pull_request_is_tested():
    checked = [yaml.safe_load(path.read_text("utf-8")) for path in FILES]
    checked = [workflow for workflow in checked if "pull_request" in triggers(workflow)]
    assert checked, "没有检查合并请求的工作流"
    for workflow in checked:
        assert any(".ci/run" in step.get("run", "") for step in steps(workflow)), "没有运行 .ci/run"


def test_other_versions_are_tried_every_week():
    """Colab 的较旧版本与各包的最新版本，每周各执行一遍全书；不拦合并。"""
    weekly = yaml.safe_load((ROOT / ".github/workflows/weekly.yml").read_text("utf-8"))
    assert set(triggers(weekly)) == {"schedule", "workflow_dispatch"}
    (schedule,) = triggers(weekly)["schedule"]
    minute, hour, day, month, weekday = schedule["cron"].split()
    assert minute.isdigit() and hour.isdigit() and (day, month) == ("*", "*") and weekday.isdigit()
    runs = {step["run"] for step in steps(weekly) if "run" in step}
    assert runs == {"make colab", "make newest"}


def test_permissions_are_minimal(workflow):
    """默认只能读；只有发布的任务能写 Pages，而且只在 main 上、测试通过之后运行。"""
    assert workflow["permissions"] == {"contents": "read"}
    writers = {name: job for name, job in workflow["jobs"].items() if "permissions" in job}
    for job in writers.values():
        assert job["permissions"] == {"pages": "write", "id-token": "write"}
        assert job["if"] == "github.ref == 'refs/heads/main'" and job["needs"] == "test"


def test_no_secrets():
    for path in FILES:
        assert not re.search(r"secrets\b|pull_request_target", path.read_text("utf-8")), path.name


def test_published_folder_is_the_one_make_book_builds():
    every = [step for path in FILES for step in steps(yaml.safe_load(path.read_text("utf-8")))]
    uploads = [step for step in every if step.get("uses", "").startswith("actions/upload-pages-artifact@")]
    assert [step["with"]["path"] for step in uploads] == ["_build/html"]
