//! Dense layers: products with a matrix, whatever dimensions its two sides have.

use super::{dims_of, init, names};
use crate::dim::{Dim, Name};
use crate::error::{Cause, Error, Place};
use crate::graph::{Graph, Tensor};
use crate::program::Init;

/// Products that one chunk of the contracted dimensions should hold, so that it fills a matrix tile.
const TILE: usize = 32;

/// Options of a dense layer.
#[derive(Clone, Debug, PartialEq)]
pub struct Dense {
    /// Whether a bias is added.
    pub bias: bool,
    /// How the kernel starts; None: [`init::glorot_uniform`].
    pub init: Option<Init>,
    /// Dimensions of x along which each index has a kernel and a bias of its own: the experts of a mixture.
    pub each: Vec<Name>,
}

impl Default for Dense {
    /// With bias, Glorot's start.
    fn default() -> Self {
        Dense { bias: true, init: None, each: vec![] }
    }
}

impl Dense {
    /// Without bias.
    pub fn unbiased() -> Dense {
        Dense { bias: false, ..Dense::default() }
    }
    /// With that start of the kernel.
    pub fn starting(self, init: Init) -> Dense {
        Dense { init: Some(init), ..self }
    }
    /// With a kernel and a bias for each index of a dimension of x.
    pub fn each(mut self, dim: impl Into<Name>) -> Dense {
        self.each.push(dim.into());
        self
    }
}

/// Makes chunks of dimensions that are contracted together hold [`TILE`] products or more, the inner ones first.
pub(super) fn raise_grains(g: &Graph, dims: &[Dim]) {
    let mut wanted = TILE;
    for d in dims.iter().rev() {
        g.grain(&d.name, wanted.min(d.size));
        wanted = wanted.div_ceil(d.size.max(1));
    }
}

/// The name that an input dimension takes when the output has one of its name.
pub(super) fn input_name(name: &Name) -> Name {
    format!("{name}_in").into()
}

/// `y = x · kernel + bias`: sums over the dimensions `over` of x and makes the dimensions `into`, which come last.
///
/// Variables `kernel` `[each.., over.., into..]` and `bias` `[each.., into..]`. A dimension may be in both `over` and `into`:
/// the kernel's side towards x is then called `<name>_in`. Dimensions of x that are not in `over` stay.
#[track_caller]
pub fn dense(x: &Tensor, name: &str, over: &[&str], into: &[Dim], options: &Dense) -> Tensor {
    let g = x.graph();
    let contracted = dims_of(x, over);
    let each = dims_of(x, &options.each.iter().map(|n| &**n).collect::<Vec<_>>());
    let ty = x.ty();
    if let Some(d) = into.iter().find(|d| ty.has(&d.name) && !over.contains(&&*d.name)) {
        let what = format!("the dense layer `{name}` cannot make {d} from {ty}, which keeps its `{}`", d.name);
        let help = format!("rename one of them, or sum over `{}` as well", d.name);
        g.fail(Error::new(Cause::Feed { what, help }).at(Place::here()));
        return x.clone();
    }
    g.layer(name, || {
        let mut x = x.clone();
        let mut sides = contracted;
        for d in sides.iter_mut().filter(|d| into.iter().any(|o| o.name == d.name)) {
            let inner = input_name(&d.name);
            x = x.rename(&d.name, &inner);
            *d = d.named(inner);
        }
        raise_grains(g, &sides);
        // The gradient of x contracts these.
        raise_grains(g, into);
        let fan = |dims: &[Dim]| dims.iter().map(|d| d.size).product::<usize>();
        let start = options.init.clone().unwrap_or(init::glorot_uniform(fan(&sides), fan(into)));
        let dims = [each.clone(), sides.clone(), into.to_vec()].concat();
        let kernel = g.variable("kernel", &dims, start).cast(ty.dtype);
        let y = x.contract_wide(&kernel, &names(&sides));
        let bias = || g.variable("bias", &[each, into.to_vec()].concat(), Init::zeros());
        let y = if options.bias { y.add(&bias()) } else { y };
        y.cast(ty.dtype)
    })
}
