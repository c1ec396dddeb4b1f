//! `conv`: convolution over one to three named spatial dimensions, with its two gradients as ops of their own.
//!
//! With windows `w` (see [`Window`]), input channels `i` and output channels `o`:
//! - `conv`: `y[.., s, o] = sum over taps j and i of x[.., s * stride - lo + j * dilation, i] * f[j, i, o]`
//! - `conv_transpose`: its adjoint in `x`, which is the transposed convolution: `x[.., s', i] = sum of y * f` over the
//!   same triples;
//! - `conv_weight_grad`: its adjoint in `f`: sums over batch and space.
//!
//! C1. One to three windows over dimensions of the input, each named once; sizes, strides and dilations at least 1,
//!     padding smaller than the window's span.
//! C2. The filter is `[k.<dim> .., input, output]` with the windows' sizes; its input size times `groups` is the
//!     input's channels, and `groups` divides the output channels.
//! C3. Input and output channel have unlike names, and the input has no dimension of the output channel's name.
//! C4. In memory the channel comes last and the spatial dimensions before it in the windows' order (the builder sees
//!     to it).
//! C5. Floats of one dtype. What is summed is `f32`, of 16-bit factors too.
//! C6. The spatial sizes fit: the input is at least as large as the windows need for one output; a transposed
//!     convolution's sizes give the outputs that there are.

use super::window::Window;
use crate::chunk::Tree;
use crate::dim::{DType, Dim, Name, Type, dim};
use crate::error::{Refusal, refuse};
use crate::graph::Tensor;
use crate::op::{GradContext, Op, Reference};
use crate::region::Region;

/// Products of minimal filtering, F(2 x 2, 3 x 3) and F(3 x 3, 2 x 2): of those that windows have.
const MINIMAL: f64 = 16.0 / 36.0;

/// A convolution.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Conv {
    /// Windows, one a spatial dimension.
    pub windows: Vec<Window>,
    /// Name of the input channel.
    pub input: Name,
    /// Name of the output channel.
    pub output: Name,
    /// Groups of channels that do not mix.
    pub groups: usize,
}

/// The gradient of a convolution by its input: the transposed convolution.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct ConvTranspose {
    /// The convolution.
    pub conv: Conv,
    /// Its input's spatial sizes.
    pub sizes: Vec<usize>,
}

/// The gradient of a convolution by its filter, from its input and the gradient of its result.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct ConvWeightGrad {
    /// The convolution.
    pub conv: Conv,
}

impl Conv {
    fn check(&self, x: &Type, channel: &Name) -> Result<(), Refusal> {
        if self.windows.is_empty() || self.windows.len() > 3 {
            return refuse("C1", format!("has {} windows", self.windows.len()), "give it one to three");
        }
        for (i, w) in self.windows.iter().enumerate() {
            w.check("C1")?;
            if !x.has(&w.dim) || self.windows[..i].iter().any(|v| v.dim == w.dim) {
                let near = crate::error::nearest(&w.dim, x.dims.iter().map(|d| &*d.name));
                let help = near.map(|n| format!("did you mean `{n}`?")).unwrap_or_default();
                return refuse("C1", format!("cannot slide along `{}` of {x}", w.dim), help);
            }
        }
        if self.input == self.output {
            return refuse(
                "C3",
                format!("has input and output channels of one name, `{}`", self.input),
                "rename the input's",
            );
        }
        let n = x.dims.len();
        let tail = self.windows.iter().map(|w| &w.dim).chain([channel]);
        let ordered = n > self.windows.len() && x.dims[n - self.windows.len() - 1..].iter().map(|d| &d.name).eq(tail);
        if !ordered {
            let m = format!("cannot take {x}: it wants the spatial dimensions and then `{channel}` last");
            return refuse("C4", m, "reorder it");
        }
        if !x.dtype.is_float() {
            return refuse("C5", format!("cannot take {}", x.dtype), "cast it to a float");
        }
        Ok(())
    }

    fn check_filter(&self, f: &Type, input: usize, output: usize) -> Result<(), Refusal> {
        let groups = self.groups.max(1);
        let mut dims: Vec<Dim> = self.windows.iter().map(|w| dim(w.kernel(), w.size)).collect();
        dims.extend([dim(&self.input, input / groups), dim(&self.output, output)]);
        if f.dims != dims || !input.is_multiple_of(groups) || !output.is_multiple_of(groups) {
            let wanted = Type::new(f.dtype, dims);
            return refuse(
                "C2",
                format!("cannot use the filter {f}, {groups} groups, {input} input channels"),
                format!("use a filter {wanted}"),
            );
        }
        Ok(())
    }

    /// The type of the result for inputs of that type and so many output channels, in their dtype.
    fn result(&self, x: &Type, output: usize) -> Result<Type, Refusal> {
        let mut dims = x.dims[..x.dims.len() - self.windows.len() - 1].to_vec();
        for w in &self.windows {
            let n = x.size_of(&w.dim).unwrap_or(0);
            let m = w.outputs(n);
            if m == 0 {
                return refuse(
                    "C6",
                    format!("has no output along `{}`: size {n}, window span {}", w.dim, w.span()),
                    "pad it, or use a smaller window",
                );
            }
            dims.push(dim(&w.dim, m));
        }
        if dims.iter().any(|d| d.name == self.output) {
            return refuse("C3", format!("would have `{}` twice", self.output), "rename the output channel");
        }
        dims.push(dim(&self.output, output));
        Ok(Type::new(x.dtype, dims))
    }

    /// Names in the order of memory that the op wants: everything else, the spatial dimensions, the channel.
    fn order(&self, x: &Type, channel: &Name) -> Vec<Name> {
        let last: Vec<&Name> = self.windows.iter().map(|w| &w.dim).chain([channel]).collect();
        let first = x.dims.iter().map(|d| &d.name).filter(|n| !last.contains(n));
        first.chain(last.iter().copied()).cloned().collect()
    }

    /// `at` with the spatial ranges turned from outputs (of sizes `m`) to the inputs they read (`reverse`: the other way).
    fn ranges(&self, at: &Region, ty: &Type, reverse: bool) -> Region {
        self.windows.iter().fold(at.of(ty), |r, w| {
            let n = ty.size_of(&w.dim).unwrap_or(0);
            let range = at.get(&w.dim).map(|o| if reverse { w.read_by(o, n) } else { w.reads(o, n) });
            match range {
                Some(range) => r.with(&w.dim, range),
                None => r,
            }
        })
    }

    /// Dimensions of the filter that are not split: of one that is read, or of the gradient.
    fn whole_of_filter(&self, read: bool) -> Vec<(Name, &'static str)> {
        let why = if read { "every window takes all taps" } else { "the taps of a gradient read the same elements" };
        let taps = self.windows.iter().map(|w| (w.kernel(), why));
        let channels = [&self.input, &self.output].into_iter().filter(|_| self.groups > 1);
        taps.chain(channels.map(|n| (n.clone(), "a group's channels are counted from its own first one"))).collect()
    }

    /// Output channels of a group.
    fn group_outputs(&self, output: usize) -> usize {
        output / self.groups.max(1)
    }

    fn flops(&self, y: &Type, input: usize) -> u64 {
        let taps: usize = self.windows.iter().map(|w| w.size).product();
        2 * (y.elements() * taps * input / self.groups.max(1)) as u64
    }

    /// Whether kernels make its outputs by minimal filtering, F(2 x 2, 3 x 3) along the last two of its dimensions: with 4/9 of
    /// the products, those of sums of inputs and of sums of weights (Winograd, "Arithmetic complexity of computations", 1980). Of
    /// windows of three by three whose inputs `x` (channels `contracted`) and outputs are many enough, and that are multiplied as
    /// `f32`: sums of `bf16` would be rounded. It depends on whole tensors alone, since it decides how results are rounded.
    pub fn is_minimal(&self, x: &Type, contracted: &Name, out: &Type) -> bool {
        let n = self.windows.len();
        let Some(last) = n.checked_sub(2).map(|first| &self.windows[first..]) else { return false };
        let patches: usize = last.iter().map(|w| out.size_of(&w.dim).unwrap_or(0).div_ceil(2)).product();
        last.iter().all(|w| [w.size, w.stride, w.dilation] == [3, 1, 1])
            && self.groups <= 1
            && x.dtype != DType::Bf16
            && (8..=4096).contains(&x.size_of(contracted).unwrap_or(0))
            && patches >= 16
    }

    /// The same of its gradient by the filter, F(3 x 3, 2 x 2), from its inputs `x` and the gradients `dy` of its outputs, summed
    /// along `tree`: of leaves that are cut into patches well.
    pub fn is_gradient_minimal(&self, x: &Type, dy: &Type, tree: &Tree) -> bool {
        let n = self.windows.len();
        let leaf: Vec<usize> = tree.dims.iter().map(|d| d.size / d.chunks).collect();
        self.is_minimal(x, &self.input, dy)
            && self.windows.iter().all(|w| [w.stride, w.dilation] == [1, 1])
            && dy.size_of(&self.output).is_some_and(|o| (8..=4096).contains(&o))
            && leaf[leaf.len() - n..].iter().rev().take(2).all(|n| *n >= 4)
    }

    /// Calls `f` with each triple of indices into x (its dims), filter and y that a product joins.
    fn triples(&self, x: &Type, y: &Type, mut f: impl FnMut(&[usize], &[usize], &[usize])) {
        let k = self.windows.len();
        let batch = y.dims.len() - k - 1;
        let (ci, co) = (x.dims[batch + k].size / self.groups.max(1), self.group_outputs(y.dims[batch + k].size));
        let taps: Vec<usize> = self.windows.iter().map(|w| w.size).collect();
        for at in ndarray::indices(y.shape()) {
            let at: Vec<usize> = (0..y.dims.len()).map(|d| at[d]).collect();
            for j in ndarray::indices(taps.clone()) {
                let inside: Option<Vec<usize>> =
                    (0..k).map(|d| self.windows[d].tap(at[batch + d], j[d], x.dims[batch + d].size)).collect();
                let Some(inside) = inside else { continue };
                let group = at[batch + k] / co;
                for i in 0..ci {
                    let xi: Vec<usize> =
                        at[..batch].iter().copied().chain(inside.iter().copied()).chain([group * ci + i]).collect();
                    let fi: Vec<usize> = (0..k).map(|d| j[d]).chain([i, at[batch + k]]).collect();
                    f(&xi, &fi, &at);
                }
            }
        }
    }
}

impl Op for Conv {
    fn name(&self) -> &'static str {
        "conv"
    }
    fn takes(&self, inputs: usize) -> bool {
        inputs == 2
    }
    fn infer(&self, x: &[&Type]) -> Result<Type, Refusal> {
        self.check(x[0], &self.input)?;
        let (input, output) = (x[0].size_of(&self.input).unwrap_or(0), x[1].size_of(&self.output).unwrap_or(0));
        self.check_filter(x[1], input, output)?;
        if x[0].dtype != x[1].dtype {
            return refuse(
                "C5",
                format!("cannot take {} and a filter of {}", x[0].dtype, x[1].dtype),
                "cast one of them",
            );
        }
        Ok(self.result(x[0], output)?.with_dtype(DType::F32))
    }
    fn grad(&self, cx: &GradContext) -> Vec<Option<Tensor>> {
        let (x, f) = (&cx.inputs[0], &cx.inputs[1]);
        let dy = cx.dy.cast(x.ty().dtype);
        let sizes = self.windows.iter().map(|w| x.dim(&w.dim).size).collect();
        // The filter's first: then x is needed no longer when its gradient, as large, is made.
        let df = x.conv_weight_grad(&dy, self);
        let dx = dy.conv_transpose(f, &ConvTranspose { conv: self.clone(), sizes }).sum_to(&x.ty());
        vec![Some(dx), Some(df)]
    }
    fn reduced(&self, x: &[&Type]) -> Vec<Dim> {
        // With groups every output has its own channels to sum over, so there is no common dimension to split.
        if self.groups > 1 { vec![] } else { vec![dim(&self.input, x[0].size_of(&self.input).unwrap_or(0))] }
    }
    fn needs(&self, i: usize, inputs: &[&Type], _: &Type, at: &Region) -> Region {
        if i == 0 { self.ranges(at, inputs[0], false) } else { at.of(inputs[1]) }
    }
    fn whole(&self, _: &[&Type], _: &Type) -> Vec<(Name, &'static str)> {
        self.whole_of_filter(true)
    }
    fn flops(&self, x: &[&Type], out: &Type) -> u64 {
        Conv::flops(self, out, x[0].size_of(&self.input).unwrap_or(0))
    }
    fn kernel_share(&self, x: &[&Type], out: &Type, _: Option<&Tree>) -> f64 {
        if self.is_minimal(x[0], &self.input, out) { MINIMAL } else { 1.0 }
    }
    fn reference(&self, x: &[&Reference], t: &[&Type], out: &Type) -> Reference {
        let mut y = Reference::zeros(out.shape());
        self.triples(t[0], out, |a, b, c| y[c] += x[0][a] * x[1][b]);
        y
    }
}

impl Op for ConvTranspose {
    fn name(&self) -> &'static str {
        "conv_transpose"
    }
    fn takes(&self, inputs: usize) -> bool {
        inputs == 2
    }
    fn infer(&self, x: &[&Type]) -> Result<Type, Refusal> {
        let (y, f, c) = (x[0], x[1], &self.conv);
        c.check(y, &c.output)?;
        let input = f.size_of(&c.input).unwrap_or(0) * c.groups.max(1);
        c.check_filter(f, input, y.size_of(&c.output).unwrap_or(0))?;
        if y.dtype != f.dtype {
            return refuse("C5", format!("cannot take {} and a filter of {}", y.dtype, f.dtype), "cast one of them");
        }
        let mut dims = y.dims[..y.dims.len() - c.windows.len() - 1].to_vec();
        for (w, &n) in c.windows.iter().zip(&self.sizes) {
            let m = y.size_of(&w.dim).unwrap_or(0);
            if w.outputs(n) != m {
                let what = format!("cannot make `{}` of size {n}: that gives {} outputs, not {m}", w.dim, w.outputs(n));
                return refuse("C6", what, "use a size that its convolution maps to the input's");
            }
            dims.push(dim(&w.dim, n));
        }
        if self.sizes.len() != c.windows.len() || dims.iter().any(|d| d.name == c.input) {
            return refuse(
                "C3",
                format!("would have `{}` twice, or lacks a size", c.input),
                "rename the channel; give a size a window",
            );
        }
        dims.push(dim(&c.input, input));
        Ok(Type::new(DType::F32, dims))
    }
    fn grad(&self, cx: &GradContext) -> Vec<Option<Tensor>> {
        let (y, f) = (&cx.inputs[0], &cx.inputs[1]);
        let dy = cx.dy.cast(y.ty().dtype);
        let df = dy.conv_weight_grad(y, &self.conv);
        vec![Some(dy.conv(f, &self.conv).sum_to(&y.ty())), Some(df)]
    }
    fn reduced(&self, x: &[&Type]) -> Vec<Dim> {
        let c = &self.conv;
        if c.groups > 1 { vec![] } else { vec![dim(&c.output, x[0].size_of(&c.output).unwrap_or(0))] }
    }
    fn needs(&self, i: usize, inputs: &[&Type], _: &Type, at: &Region) -> Region {
        if i == 0 {
            return self.conv.ranges(at, inputs[0], true);
        }
        let filter = at.of(inputs[1]);
        if self.conv.groups == 1 {
            return filter;
        }
        // The filter's input channels are those of one group, the result's are those of all.
        filter.with(&self.conv.input, 0..inputs[1].size_of(&self.conv.input).unwrap_or(0))
    }
    fn whole(&self, _: &[&Type], _: &Type) -> Vec<(Name, &'static str)> {
        self.conv.whole_of_filter(true)
    }
    fn flops(&self, x: &[&Type], out: &Type) -> u64 {
        self.conv.flops(x[0], out.size_of(&self.conv.input).unwrap_or(0))
    }
    fn kernel_share(&self, x: &[&Type], out: &Type, _: Option<&Tree>) -> f64 {
        if self.conv.is_minimal(x[0], &self.conv.output, out) { MINIMAL } else { 1.0 }
    }
    fn reference(&self, x: &[&Reference], t: &[&Type], out: &Type) -> Reference {
        let mut y = Reference::zeros(out.shape());
        self.conv.triples(out, t[0], |a, b, c| y[a] += x[0][c] * x[1][b]);
        y
    }
}

impl Op for ConvWeightGrad {
    fn name(&self) -> &'static str {
        "conv_weight_grad"
    }
    fn takes(&self, inputs: usize) -> bool {
        inputs == 2
    }
    fn infer(&self, x: &[&Type]) -> Result<Type, Refusal> {
        let c = &self.conv;
        c.check(x[0], &c.input)?;
        c.check(x[1], &c.output)?;
        let output = x[1].size_of(&c.output).unwrap_or(0);
        let wanted = c.result(x[0], output)?;
        if wanted != *x[1] {
            return refuse(
                "C6",
                format!("cannot pair {} with the gradient {}", x[0], x[1]),
                format!("the gradient should be {wanted}"),
            );
        }
        let input = x[0].size_of(&c.input).unwrap_or(0);
        let mut dims: Vec<Dim> = c.windows.iter().map(|w| dim(w.kernel(), w.size)).collect();
        dims.extend([dim(&c.input, input / c.groups.max(1)), dim(&c.output, output)]);
        Ok(Type::new(DType::F32, dims))
    }
    fn grad(&self, cx: &GradContext) -> Vec<Option<Tensor>> {
        let (x, y) = (&cx.inputs[0], &cx.inputs[1]);
        let df = cx.dy.cast(x.ty().dtype);
        let sizes = self.conv.windows.iter().map(|w| x.dim(&w.dim).size).collect();
        let dx = y.conv_transpose(&df, &ConvTranspose { conv: self.conv.clone(), sizes });
        vec![Some(dx.sum_to(&x.ty())), Some(x.conv(&df, &self.conv).sum_to(&y.ty()))]
    }
    fn reduced(&self, x: &[&Type]) -> Vec<Dim> {
        x[1].dims[..x[1].dims.len() - 1].to_vec()
    }
    fn needs(&self, i: usize, inputs: &[&Type], _: &Type, at: &Region) -> Region {
        if i == 1 {
            return at.of(inputs[1]);
        }
        let r = self.conv.ranges(at, inputs[0], false);
        if self.conv.groups == 1 {
            return r;
        }
        // The filter's input channels are those of one group, the input's are those of all.
        let all = inputs[0].size_of(&self.conv.input).unwrap_or(0);
        r.with(&self.conv.input, 0..all)
    }
    fn whole(&self, _: &[&Type], _: &Type) -> Vec<(Name, &'static str)> {
        self.conv.whole_of_filter(false)
    }
    fn flops(&self, x: &[&Type], _: &Type) -> u64 {
        self.conv.flops(x[1], x[0].size_of(&self.conv.input).unwrap_or(0))
    }
    fn kernel_share(&self, x: &[&Type], _: &Type, tree: Option<&Tree>) -> f64 {
        if tree.is_some_and(|tree| self.conv.is_gradient_minimal(x[0], x[1], tree)) { MINIMAL } else { 1.0 }
    }
    fn reference(&self, x: &[&Reference], t: &[&Type], out: &Type) -> Reference {
        let mut f = Reference::zeros(out.shape());
        self.conv.triples(t[0], t[1], |a, b, c| f[b] += x[0][a] * x[1][c]);
        f
    }
}

fn ordered(x: &Tensor, names: &[Name]) -> Tensor {
    x.reorder(&names.iter().map(|n| &**n).collect::<Vec<_>>())
}

impl Tensor {
    /// The convolution of `[.., spatial.., input]` with a filter `[k.<dim>.., input, output]`: `[.., spatial.., output]`. Of
    /// their dtype; summed in `f32`.
    #[track_caller]
    pub fn conv(&self, filter: &Tensor, conv: &Conv) -> Tensor {
        self.conv_wide(filter, conv).cast(self.ty().dtype)
    }
    /// [`Tensor::conv`] as it was summed: `f32`, of 16-bit factors too.
    #[track_caller]
    pub fn conv_wide(&self, filter: &Tensor, conv: &Conv) -> Tensor {
        let x = ordered(self, &conv.order(&self.ty(), &conv.input));
        self.graph().apply(conv.clone(), &[&x, filter])
    }
    /// The transposed convolution of `[.., spatial.., output]` with the same filter: `[.., spatial.., input]`.
    #[track_caller]
    pub fn conv_transpose(&self, filter: &Tensor, op: &ConvTranspose) -> Tensor {
        self.conv_transpose_wide(filter, op).cast(self.ty().dtype)
    }
    /// [`Tensor::conv_transpose`] as it was summed: `f32`, of 16-bit factors too.
    #[track_caller]
    pub fn conv_transpose_wide(&self, filter: &Tensor, op: &ConvTranspose) -> Tensor {
        let y = ordered(self, &op.conv.order(&self.ty(), &op.conv.output));
        self.graph().apply(op.clone(), &[&y, filter])
    }
    /// The gradient of `self.conv(filter, conv)` by the filter, given that of the result.
    #[track_caller]
    pub fn conv_weight_grad(&self, dy: &Tensor, conv: &Conv) -> Tensor {
        let x = ordered(self, &conv.order(&self.ty(), &conv.input));
        let dy = ordered(dy, &conv.order(&dy.ty(), &conv.output));
        self.graph().apply(ConvWeightGrad { conv: conv.clone() }, &[&x, &dy]).cast(x.ty().dtype)
    }
}
