"""The same training step in eager PyTorch, to be measured against; needs the extra `bench`.

GDFQ's generator, a CIFAR ResNet-20 as teacher and as fake-quantized student, the batch-norm
statistics loss, KL, SGD with Nesterov momentum, and Gradient Inundation as published: tensor by
tensor, doubling without bound, then five bisections. Written for this benchmark from the papers;
`tests/experiments/test_torch_step.py` compares its losses with recorded ones.
"""

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["Generator", "ResNet20", "TorchStep", "codes", "fake_quant"]


def _grid(lo, hi, bits):
    scale = (2**bits - 1) / (hi - lo).clamp(min=1e-8)
    return scale, torch.round(scale * lo) + 2 ** (bits - 1)


def _codes_on(x, scale, zero_point, bits):
    half = 2 ** (bits - 1)
    return torch.round(scale * x - zero_point).clamp(-half, half - 1)


def _channel_range(w):
    flat = w.detach().flatten(1)
    shape = (-1,) + (1,) * (w.dim() - 1)
    return flat.min(1).values.view(shape), flat.max(1).values.view(shape)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, lo, hi, bits):
        scale, zero_point = _grid(lo, hi, bits)
        return (_codes_on(x, scale, zero_point, bits) + zero_point) / scale

    @staticmethod
    def backward(ctx, g):
        return g, None, None, None


def fake_quant(x, lo, hi, bits):
    """Rounds `x` to the grid of `[lo, hi]`, straight-through."""
    return _StraightThrough.apply(x, lo, hi, bits)


def codes(w, bits):
    """Codes of a kernel (output channels first) on its own grid."""
    return _codes_on(w, *_grid(*_channel_range(w), bits), bits)


class _Block(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.pad = stride, (outputs - inputs) // 2

    def forward(self, x, conv, act):
        y = act(self.bn1(conv(self.conv1, x)))
        y = self.bn2(conv(self.conv2, y))
        if self.stride != 1:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        return act(x + y)


class ResNet20(nn.Module):
    """CIFAR ResNet-20, option A; quantized where `ranges` are given."""

    def __init__(self, bits=4):
        super().__init__()
        self.bits, self.ranges, self.observed = bits, None, None
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        widths = ((16, 16, 1), (16, 32, 2), (32, 64, 2))
        for i, (inputs, outputs, stride) in enumerate(widths, start=1):
            blocks = [_Block(inputs, outputs, stride)]
            blocks += [_Block(outputs, outputs, 1) for _ in range(2)]
            setattr(self, f"layer{i}", nn.ModuleList(blocks))
        self.linear = nn.Linear(64, 10)

    def _kernel(self, w):
        return w if self.ranges is None else fake_quant(w, *_channel_range(w), self.bits)

    def forward(self, x):
        """Logits of images [N, 3, H, W]."""
        site = 0

        def conv(module, x):
            return F.conv2d(x, self._kernel(module.weight), None, module.stride, module.padding)

        def act(x):
            nonlocal site
            x = F.relu(x)
            if self.observed is not None:
                self.observed.append(torch.stack((x.min(), x.max())))
            if self.ranges is not None:
                x = fake_quant(x, self.ranges[site, 0], self.ranges[site, 1], self.bits)
                site += 1
            return x

        x = act(self.bn1(conv(self.conv1, x)))
        for layer in (self.layer1, self.layer2, self.layer3):
            for block in layer:
                x = block(x, conv, act)
        return F.linear(x.mean((2, 3)), self._kernel(self.linear.weight), self.linear.bias)


class Generator(nn.Module):
    """GDFQ's generator, CIFAR form; the names are those of the recorded state."""

    def __init__(self, latent=100, size=32, channels=3, classes=10):
        super().__init__()
        self.side = size // 4
        self.label_emb = nn.Embedding(classes, latent)
        self.l1 = nn.Sequential(nn.Linear(latent, 128 * self.side**2))
        self.conv_blocks0 = nn.Sequential(nn.BatchNorm2d(128))
        self.conv_blocks1 = nn.Sequential(
            nn.Conv2d(128, 128, 3, padding=1), nn.BatchNorm2d(128, eps=0.8), nn.LeakyReLU(0.2)
        )
        self.conv_blocks2 = nn.Sequential(
            nn.Conv2d(128, 64, 3, padding=1),
            nn.BatchNorm2d(64, eps=0.8),
            nn.LeakyReLU(0.2),
            nn.Conv2d(64, channels, 3, padding=1),
            nn.Tanh(),
            nn.BatchNorm2d(channels, affine=False),
        )

    def forward(self, z, labels):
        """Images [N, C, size, size] of latents [N, latent] and labels [N]."""
        x = self.l1(self.label_emb(labels) * z).view(len(z), 128, self.side, self.side)
        x = self.conv_blocks1(F.interpolate(self.conv_blocks0(x), scale_factor=2))
        return self.conv_blocks2(F.interpolate(x, scale_factor=2))


class _StatisticsLoss:
    """Collects BNS from the inputs of a network's batch norms."""

    def __init__(self, model):
        self.terms = []
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.register_forward_pre_hook(self._observe)

    def _observe(self, module, inputs):
        var, mean = torch.var_mean(inputs[0], dim=(0, 2, 3), unbiased=False)
        self.terms.append(
            F.mse_loss(mean, module.running_mean) + F.mse_loss(var, module.running_var)
        )

    def take(self):
        terms, self.terms = self.terms, []
        return torch.stack(terms).mean()


class TorchStep:
    """A whole iteration; `losses_of` runs one and returns (generator's loss, student's loss)."""

    def __init__(self, *, bits=4, lr=1e-4, momentum=0.9, fraction=1e-3, temperature=20.0):
        self.lr, self.momentum, self.fraction = lr, momentum, fraction
        self.bits, self.temperature = bits, temperature
        self.generator = Generator().train()
        self.teacher = ResNet20().eval().requires_grad_(False)
        self.statistics = _StatisticsLoss(self.teacher)
        self.student = ResNet20(bits).eval()
        self.adam = torch.optim.Adam(self.generator.parameters(), lr=1e-3, betas=(0.5, 0.999))
        self.buffers = {}

    def load_teacher(self, state):
        """Takes the teacher's weights for both networks."""
        self.teacher.load_state_dict(state)
        self.student.load_state_dict(state)

    @torch.no_grad()
    def calibrate(self, z, labels):
        """Freezes each activation range at what it is in one batch."""
        self.student.ranges, self.student.observed = None, []
        self.student(self.generator(z, labels))
        self.student.ranges = torch.stack(self.student.observed)
        self.student.observed = None

    def generator_step(self, z, labels):
        """Trains the generator; returns images, the teacher's logits and the loss."""
        images = self.generator(z, labels)
        teacher_logits = self.teacher(images)
        generator_loss = F.cross_entropy(teacher_logits, labels) + 0.1 * self.statistics.take()
        self.adam.zero_grad()
        generator_loss.backward()
        self.adam.step()
        return images.detach(), teacher_logits.detach(), generator_loss

    def losses_of(self, z, labels):
        """One iteration on latents [N, 100] and labels [N]."""
        images, teacher_logits, generator_loss = self.generator_step(z, labels)
        t = self.temperature
        logits = self.student(images)
        kl = F.kl_div(
            F.log_softmax(logits / t, 1),
            F.softmax(teacher_logits / t, 1),
            reduction="sum",
        )
        student_loss = t * t * kl / logits.numel()
        self.student.zero_grad()
        student_loss.backward()
        self._update_student()
        return generator_loss.item(), student_loss.item()

    @torch.no_grad()
    def _update_student(self):
        for name, w in self.student.named_parameters():
            buffer = self.buffers.get(name)
            if buffer is None:
                self.buffers[name] = buffer = w.grad.clone()
            else:
                buffer.mul_(self.momentum).add_(w.grad)
            update = w.grad.add(buffer, alpha=self.momentum).mul_(-self.lr)
            w.add_(update, alpha=self._alpha(w, update) if w.dim() > 1 else 1.0)

    def _alpha(self, w, update):
        old = codes(w, self.bits)

        def share(alpha):
            return (codes(w + alpha * update, self.bits) != old).float().mean().item()

        alpha, reached = 1.0, share(1.0)
        if reached >= self.fraction:
            return alpha
        while reached < self.fraction:
            alpha *= 2
            reached = share(alpha)
        low, high = alpha / 2, alpha
        for _ in range(5):
            alpha = (low + high) / 2
            reached = share(alpha)
            if abs(reached - self.fraction) <= 0.01 * self.fraction:
                break
            low, high = (low, alpha) if reached > self.fraction else (alpha, high)
        return alpha
