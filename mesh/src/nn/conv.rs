//! Convolution layers over one to three named spatial dimensions.

use super::dense::{input_name, raise_grains};
use super::init;
use crate::dim::{DType, Dim, Name, dim};
use crate::error::{Cause, Error, Place};
use crate::graph::Tensor;
use crate::ops::conv::{Conv, ConvTranspose};
use crate::ops::window::Window;
use crate::program::Init;

/// What lies around the input of a convolution: zeros.
#[derive(Clone, Debug, PartialEq)]
pub enum Padding {
    /// So many that a dimension of size n gives `ceil(n / stride)` outputs; an odd one goes behind.
    Same,
    /// None.
    Valid,
    /// So many before and after each dimension, in the kernel's order.
    Explicit(Vec<(usize, usize)>),
}

/// The kernel of a convolution layer: `Kernel::new(&["x", "y", "z"], 3).stride(2).unbiased()`.
#[derive(Clone, Debug, PartialEq)]
pub struct Kernel {
    /// Spatial dimensions and the kernel's size along each.
    pub sizes: Vec<(Name, usize)>,
    /// Input steps from one output to the next (of a transposed convolution: output steps from one input to the next).
    pub stride: usize,
    /// Steps from one tap to the next.
    pub dilation: usize,
    /// Padding.
    pub padding: Padding,
    /// Groups of channels that do not mix.
    pub groups: usize,
    /// Whether a bias is added.
    pub bias: bool,
    /// The input's channel dimension; None: it is called as the output's.
    pub input: Option<Name>,
    /// Spatial sizes that a transposed convolution gives; None: the smallest ones for valid or explicit padding, the
    /// input's times the stride for [`Padding::Same`].
    pub to: Option<Vec<usize>>,
    /// How the filter starts; None: [`init::he_normal`].
    pub init: Option<Init>,
}

impl Kernel {
    /// A kernel of one size along the dimensions named: stride 1, same padding, with bias.
    pub fn new(dims: &[&str], size: usize) -> Kernel {
        Kernel::of(dims.iter().map(|d| (*d, size)).collect::<Vec<_>>().as_slice())
    }
    /// A kernel of a size a dimension.
    pub fn of(sizes: &[(&str, usize)]) -> Kernel {
        Kernel {
            sizes: sizes.iter().map(|(n, s)| (Name::from(*n), *s)).collect(),
            stride: 1,
            dilation: 1,
            padding: Padding::Same,
            groups: 1,
            bias: true,
            input: None,
            to: None,
            init: None,
        }
    }
    /// With that stride.
    pub fn stride(self, stride: usize) -> Kernel {
        Kernel { stride, ..self }
    }
    /// With taps that far apart.
    pub fn dilation(self, dilation: usize) -> Kernel {
        Kernel { dilation, ..self }
    }
    /// With that padding.
    pub fn padding(self, padding: Padding) -> Kernel {
        Kernel { padding, ..self }
    }
    /// With so many groups of channels that do not mix.
    pub fn groups(self, groups: usize) -> Kernel {
        Kernel { groups, ..self }
    }
    /// Without bias.
    pub fn unbiased(self) -> Kernel {
        Kernel { bias: false, ..self }
    }
    /// From the channel dimension of that name.
    pub fn from_channel(self, input: impl Into<Name>) -> Kernel {
        Kernel { input: Some(input.into()), ..self }
    }
    /// A transposed convolution to these spatial sizes: those of a skip connection, say, that was odd before pooling.
    pub fn to(self, sizes: &[usize]) -> Kernel {
        Kernel { to: Some(sizes.to_vec()), ..self }
    }
    /// With that start of the filter.
    pub fn starting(self, init: Init) -> Kernel {
        Kernel { init: Some(init), ..self }
    }

    fn pads(&self, i: usize) -> (usize, usize) {
        match &self.padding {
            Padding::Same | Padding::Valid => (0, 0),
            Padding::Explicit(pads) => pads.get(i).copied().unwrap_or((0, 0)),
        }
    }

    /// The window along spatial dimension `i`, over `n` elements of a convolution's input.
    fn window(&self, i: usize, n: usize) -> Window {
        let (name, size) = &self.sizes[i];
        match self.padding {
            Padding::Same => Window::same(name, n, *size, self.stride, self.dilation),
            Padding::Valid | Padding::Explicit(_) => {
                let (lo, hi) = self.pads(i);
                Window::padded(name, *size, self.stride, lo, hi).dilated(self.dilation)
            }
        }
    }

    /// The spatial size that a transposed convolution gives along dimension `i` for an input of size `m`.
    fn grown(&self, i: usize, m: usize) -> usize {
        match (&self.to, &self.padding) {
            (Some(sizes), _) => sizes.get(i).copied().unwrap_or(0),
            (None, Padding::Same) => m * self.stride,
            (None, Padding::Valid | Padding::Explicit(_)) => {
                let (lo, hi) = self.pads(i);
                let reach = m.saturating_sub(1) * self.stride + self.sizes[i].1.saturating_sub(1) * self.dilation + 1;
                reach.saturating_sub(lo + hi)
            }
        }
    }

    /// What is wrong with it, between those channels.
    fn mistake(&self, input: &Dim, output: &Dim) -> Option<(String, &'static str)> {
        let n = self.sizes.len();
        if self.stride == 0 || self.dilation == 0 || self.groups == 0 || self.sizes.iter().any(|(_, s)| *s == 0) {
            return Some(("has a size, stride, dilation or number of groups of 0".into(), "make them 1 or more"));
        }
        if matches!(&self.padding, Padding::Explicit(pads) if pads.len() != n) {
            return Some((format!("has {n} spatial dimensions and another number of paddings"), "give one to each"));
        }
        if self.to.as_ref().is_some_and(|sizes| sizes.len() != n) {
            return Some((format!("has {n} spatial dimensions and another number of sizes"), "give one to each"));
        }
        let uneven = [input, output].into_iter().find(|d| !d.size.is_multiple_of(self.groups))?;
        Some((format!("cannot cut {uneven} into {} groups", self.groups), "use a divisor of both numbers of channels"))
    }

    fn filter(&self, x: &Tensor, input: &Dim, output: &Dim, fan_in: usize) -> Tensor {
        let mut dims: Vec<Dim> = self.sizes.iter().map(|(n, s)| dim(format!("k.{n}"), *s)).collect();
        dims.extend([input.clone(), output.clone()]);
        let start = self.init.clone().unwrap_or(init::he_normal(fan_in));
        x.graph().variable("filter", &dims, start).cast(x.ty().dtype)
    }

    fn taps(&self) -> usize {
        self.sizes.iter().map(|(_, s)| s).product()
    }
}

/// What a layer works on: x' channel, and its sizes along the kernel's dimensions. None, and the mistake is noted, if kernel
/// and x cannot go together.
#[track_caller]
fn prepare(x: &Tensor, name: &str, kernel: &Kernel, channel: &Dim) -> Option<(Dim, Vec<usize>)> {
    let ty = x.ty();
    if kernel.input.is_none() && !ty.has(&channel.name) {
        let what = format!("the convolution `{name}` does not know which dimension of {ty} is to become {channel}");
        let help = "say so with `Kernel::from_channel`".into();
        x.graph().fail(Error::new(Cause::Feed { what, help }).at(Place::here()));
        return None;
    }
    let own = x.dim(kernel.input.as_ref().unwrap_or(&channel.name));
    let mut sizes = Vec::with_capacity(kernel.sizes.len());
    for (n, _) in &kernel.sizes {
        sizes.push(x.dim(n).size);
    }
    if let Some((mistake, help)) = kernel.mistake(&own, channel) {
        let what = format!("the kernel of `{name}` {mistake}");
        x.graph().fail(Error::new(Cause::Feed { what, help: help.into() }).at(Place::here()));
        return None;
    }
    Some((own, sizes))
}

/// x, its channel under a name that the result's does not have, and that channel. It is the layer's own, and lies as that does.
fn renamed(x: &Tensor, own: Dim, channel: &Dim) -> (Tensor, Dim) {
    if own.name != channel.name {
        return (x.clone(), own);
    }
    let inner = input_name(&own.name);
    (x.rename(&own.name, &inner), own.named(inner))
}

/// What was summed up, with a layer's bias, in the layer's dtype.
fn biased(sums: Tensor, dtype: DType, kernel: &Kernel, channel: &Dim) -> Tensor {
    let bias = || sums.graph().variable("bias", std::slice::from_ref(channel), Init::zeros());
    let y = if kernel.bias { sums.add(&bias()) } else { sums };
    y.cast(dtype)
}

/// The convolution of x `[.., spatial.., channels]` to `channel`: `[.., spatial.., channel]`.
///
/// Variables `filter` `[k.<dim>.., input, channel]` and `bias` `[channel]`. If the input's channel dimension has the
/// name of the output's, the filter's side towards x is called `<name>_in`.
#[track_caller]
pub fn conv(x: &Tensor, name: &str, kernel: &Kernel, channel: &Dim) -> Tensor {
    let Some((own, sizes)) = prepare(x, name, kernel, channel) else { return x.clone() };
    x.graph().layer(name, || {
        let (x, input) = renamed(x, own, channel);
        raise_grains(x.graph(), std::slice::from_ref(&input));
        raise_grains(x.graph(), std::slice::from_ref(channel));
        let windows = sizes.iter().enumerate().map(|(i, n)| kernel.window(i, *n)).collect();
        let each = dim(&input.name, input.size / kernel.groups);
        let filter = kernel.filter(&x, &each, channel, kernel.taps() * each.size);
        let op = Conv { windows, input: input.name, output: channel.name.clone(), groups: kernel.groups };
        biased(x.conv_wide(&filter, &op), x.ty().dtype, kernel, channel)
    })
}

/// The transposed convolution of x `[.., spatial.., channels]` to `channel`: the adjoint of the convolution that leads
/// from the result's size to x'. `Kernel::new(&["x", "y", "z"], 2).stride(2)` doubles a volume.
///
/// Variables `filter` `[k.<dim>.., channel, input]` (that convolution's) and `bias` `[channel]`.
#[track_caller]
pub fn conv_transpose(x: &Tensor, name: &str, kernel: &Kernel, channel: &Dim) -> Tensor {
    let Some((own, sizes)) = prepare(x, name, kernel, channel) else { return x.clone() };
    x.graph().layer(name, || {
        let (x, input) = renamed(x, own, channel);
        raise_grains(x.graph(), std::slice::from_ref(&input));
        raise_grains(x.graph(), std::slice::from_ref(channel));
        let sizes: Vec<usize> = sizes.iter().enumerate().map(|(i, m)| kernel.grown(i, *m)).collect();
        let windows = sizes.iter().enumerate().map(|(i, n)| kernel.window(i, *n)).collect();
        let each = dim(&channel.name, channel.size / kernel.groups);
        // Of `taps` products a channel, one in stride^n meets in an output.
        let met = kernel.taps().div_ceil(kernel.stride.pow(kernel.sizes.len() as u32));
        let filter = kernel.filter(&x, &each, &input, met * input.size / kernel.groups);
        let conv = Conv { windows, input: channel.name.clone(), output: input.name, groups: kernel.groups };
        let op = ConvTranspose { conv, sizes };
        biased(x.conv_transpose_wide(&filter, &op), x.ty().dtype, kernel, channel)
    })
}
