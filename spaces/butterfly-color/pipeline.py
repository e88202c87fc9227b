"""颜色引导的采样：网络不必重新训练，要什么颜色就往什么颜色推。"""

import math

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, ImagePipelineOutput


class ColorGuidedPipeline(DiffusionPipeline):
    """unet：无条件的 UNet2DModel，预测速度或噪声；scheduler：任何一种 DDPM 的调度器，采样改用 DDIM。"""

    def __init__(self, unet, scheduler):
        super().__init__()
        # 预测噪声的网络，在最大的时间步上由噪声算不出原图，就从靠里的时间步走起
        spacing = "trailing" if scheduler.config.prediction_type == "v_prediction" else "leading"
        scheduler = DDIMScheduler.from_config(scheduler.config, timestep_spacing=spacing)
        self.register_modules(unet=unet, scheduler=scheduler)

    def __call__(self, color, guidance_scale=40.0, batch_size=1, num_inference_steps=20, generator=None):
        """color：目标颜色，三个 0 到 1 的数（红、绿、蓝）；guidance_scale：强度，0 是不引导。"""
        if len(color) != 3 or not all(0 <= value <= 1 for value in color):
            raise ValueError(f"color 应是三个 0 到 1 的数（红、绿、蓝），收到的是 {color}。")
        if not (math.isfinite(guidance_scale) and abs(guidance_scale) <= 1000):
            raise ValueError(f"guidance_scale 应在 −1000 到 1000 之间，收到的是 {guidance_scale}。")
        self.unet.requires_grad_(False)
        target = torch.tensor(color, device=self.device).view(3, 1, 1) * 2 - 1
        size = self.unet.config.sample_size
        x = torch.randn(batch_size, 3, size, size, generator=generator).to(self.device)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.progress_bar(self.scheduler.timesteps):
            x = x.detach().requires_grad_()
            prediction = self.unet(x, t).sample
            alpha_bar = self.scheduler.alphas_cumprod[int(t)].to(x)
            if self.scheduler.config.prediction_type == "v_prediction":
                x0 = alpha_bar.sqrt() * x - (1 - alpha_bar).sqrt() * prediction
            else:                                       # 预测噪声
                x0 = (x - (1 - alpha_bar).sqrt() * prediction) / alpha_bar.sqrt()
            loss = (x0 - target).abs().mean(dim=(1, 2, 3)).sum()
            gradient = torch.autograd.grad(loss, x)[0]
            with torch.no_grad():
                x = self.scheduler.step(prediction, t, x - guidance_scale * gradient).prev_sample
        images = (x / 2 + 0.5).clamp(0, 1).cpu().permute(0, 2, 3, 1).numpy()
        return ImagePipelineOutput(images=self.numpy_to_pil(images))
