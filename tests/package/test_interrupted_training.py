"""训练在随机的时刻被 kill -9 十次，每次接着来，结果与不受打扰的训练一位不差。"""

import json
import multiprocessing
import random
import threading
import time

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

import book_utils
from book_utils.training import load_state, written_whole

N_KILLS = 10


def denoising_loss(model, x, generator):
    """每一步都抽新的噪声，所以随机数生成器接不上，损失就会不同。"""
    return (model(x + 0.1 * torch.randn(x.shape, generator=generator)) - x).square().mean()


def train(folder):
    """在子进程里训练，写出损失与权重。"""
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())        # 默认的锁在进程之间共用，进程被强行终止就收不回来
    book_utils.set_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 8))
    x = torch.linspace(-1, 1, 800).view(100, 8)
    history = book_utils.fit(
        model, (x,), denoising_loss, n_epochs=60, batch_size=16, lr=0.01, lr_decay=True, ema_decay=0.99, seed=3,
        checkpoint=folder / "checkpoint.safetensors", checkpoint_every=3,
    )
    save_file(model.state_dict(), folder / "model.safetensors")
    with written_whole(folder / "losses.json") as partial:
        partial.write_text(json.dumps(history.losses), encoding="utf-8")


def test_killed_ten_times_ends_the_same(tmp_path):
    seed = random.randrange(10**6)
    print("种子：", seed)                    # 失败时 pytest 会显示，把它填回上一行就是同样的时刻
    rng = random.Random(seed)
    # forkserver：先导入好，再分出每一个子进程，省去每次几秒的导入
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["book_utils"])

    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    undisturbed.mkdir()
    killed.mkdir()

    def run(folder, seconds=None):
        """开始训练；给出 seconds 时到点就 kill -9。返回退出码。"""
        process = context.Process(target=train, args=(folder,))
        process.start()
        process.join(seconds)
        if process.exitcode is None:
            process.kill()
            process.join()
        return process.exitcode

    def assert_the_same():
        losses = [json.loads((folder / "losses.json").read_text(encoding="utf-8")) for folder in (killed, undisturbed)]
        assert losses[0] == losses[1]
        ours, theirs = load_file(killed / "model.safetensors"), load_file(undisturbed / "model.safetensors")
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)

    assert run(undisturbed) == 0
    (undisturbed / "checkpoint.safetensors").unlink()
    started = time.perf_counter()
    assert run(undisturbed) == 0            # 第二次不含导入的时间，用来定下在多长时间里挑时刻
    duration = time.perf_counter() - started

    kills, reached = 0, []
    while kills < N_KILLS:
        if run(killed, rng.uniform(0, 0.25 * duration)) == 0:       # 已经到头了：核对，再从头来
            assert_the_same()
            for path in killed.iterdir():
                path.unlink()
        else:
            kills += 1
        if (killed / "checkpoint.safetensors").exists():            # 断点要么没有，要么完整
            tensors, _ = load_state(killed / "checkpoint.safetensors")
            reached.append(len(tensors["losses"]))
    print("每次终止时断点里的步数：", reached)
    assert run(killed) == 0
    assert_the_same()
    assert not list(killed.glob("*.partial"))
