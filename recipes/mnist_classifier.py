"""配方：数字分类器 mnist-classifier，用来给生成的数字打分（第 3.7.2 节）。

用法：python recipes/mnist_classifier.py
"""

from common import parser, save_model
from safetensors.torch import save_file
from torch.nn import functional as F

from book_utils import DigitClassifier, fit, mnist_tensors, set_seed


def batch_loss(model, images, labels, generator):
    return F.cross_entropy(model(images), labels)


def main():
    options = parser(__doc__.splitlines()[0], "mnist-classifier").parse_args()
    set_seed(0)
    model = DigitClassifier()
    history = fit(
        model, mnist_tensors(train=True), batch_loss, n_epochs=4, lr=2e-3, lr_decay=True,
        device=options.device, checkpoint=options.checkpoint, max_steps=options.max_steps,
    )
    if options.max_steps is None:
        save_model(
            options.output,
            lambda folder: save_file(model.cpu().half().state_dict(), folder / "model.safetensors"),
            history, options.device, "python recipes/mnist_classifier.py",
        )


if __name__ == "__main__":
    main()
