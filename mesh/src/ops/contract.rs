//! `contract`: products of two tensors summed over dimensions; einsum by names. The sum is `f32`, of 16-bit factors too.
//!
//! C1. Both are floats of one dtype.
//! C2. A dimension that both have is of the same size in both.
//! C3. Every dimension summed over is one of theirs, named once.

use super::binary::{broadcast_dims, broadcast_reference};
use crate::dim::{DType, Dim, Name, Type};
use crate::error::{Refusal, nearest, refuse};
use crate::graph::Tensor;
use crate::op::{GradContext, Op, Reference};

/// The sum of products; the result has the first one's remaining dimensions, then what the second one adds.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Contract {
    /// Dimensions summed over.
    pub over: Vec<Name>,
}

/// All dimensions of two tensors: the first one's, then what the second one adds.
fn union(x: &[&Type]) -> Vec<Dim> {
    let mut dims = x[0].dims.clone();
    dims.extend(x[1].dims.iter().filter(|d| !x[0].has(&d.name)).cloned());
    dims
}

impl Contract {
    /// Whether the result is no smaller than both factors together and has dimensions that both of them have: products of
    /// all pairs of rows, batch by batch, such as attention's scores. They take more room than what they are made from, and
    /// few operations an element.
    pub fn spreads(&self, a: &Type, b: &Type, result: &Type) -> bool {
        result.dims.iter().any(|d| a.has(&d.name) && b.has(&d.name)) && result.elements() >= a.elements() + b.elements()
    }
}

impl Op for Contract {
    fn name(&self) -> &'static str {
        "contract"
    }
    fn takes(&self, inputs: usize) -> bool {
        inputs == 2
    }
    fn infer(&self, x: &[&Type]) -> Result<Type, Refusal> {
        if x[0].dtype != x[1].dtype || !x[0].dtype.is_float() {
            return refuse(
                "C1",
                format!("cannot multiply {} and {}", x[0].dtype, x[1].dtype),
                "cast them to one float type",
            );
        }
        if let Err(m) = broadcast_dims(x) {
            return refuse("C2", format!("cannot multiply {} and {}: {m}", x[0], x[1]), "rename or slice one of them");
        }
        let all = union(x);
        for (i, n) in self.over.iter().enumerate() {
            if !all.iter().any(|d| d.name == *n) || self.over[..i].contains(n) {
                let help = nearest(n, all.iter().map(|d| &*d.name))
                    .map(|n| format!("did you mean `{n}`?"))
                    .unwrap_or_default();
                return refuse("C3", format!("cannot sum {} times {} over `{n}`", x[0], x[1]), help);
            }
        }
        Ok(Type::new(DType::F32, all).without(&self.over))
    }
    fn grad(&self, cx: &GradContext) -> Vec<Option<Tensor>> {
        // Of one dtype, so that both products take what is stored once.
        let gradient = cx.dy.cast(cx.inputs[0].ty().dtype);
        let side = |own: &Tensor, other: &Tensor| {
            let (ty, other_ty) = (own.ty(), other.ty());
            let dy = gradient.ty();
            let all = union(&[&dy, &other_ty]);
            let over: Vec<&str> = all.iter().filter(|d| !ty.has(&d.name)).map(|d| &*d.name).collect();
            // The second factor's dimensions come last: what comes last here lies where the gradient's own does.
            let last = ty.dims.iter().rev().find(|d| dy.has(&d.name) != other_ty.has(&d.name));
            let product = match last {
                Some(d) if dy.has(&d.name) => other.contract(&gradient, &over),
                _ => gradient.contract(other, &over),
            };
            // A dimension that only this side has was summed over: the gradient is the same all along it.
            let missing: Vec<Dim> = ty.dims.iter().filter(|d| !product.ty().has(&d.name)).cloned().collect();
            if missing.is_empty() { product.sum_to(&ty) } else { product.broadcast(&ty.dims) }
        };
        let (a, b) = (&cx.inputs[0], &cx.inputs[1]);
        // Weights come second as a rule: then the other factor is needed no longer when its gradient, as large, is made.
        let second = side(b, a);
        vec![Some(side(a, b)), Some(second)]
    }
    fn reduced(&self, x: &[&Type]) -> Vec<Dim> {
        union(x).into_iter().filter(|d| self.over.contains(&d.name)).collect()
    }
    fn flops(&self, x: &[&Type], _: &Type) -> u64 {
        2 * union(x).iter().map(|d| d.size as u64).product::<u64>()
    }
    fn reference(&self, x: &[&Reference], t: &[&Type], out: &Type) -> Reference {
        let all = Type::new(out.dtype, union(t));
        let product = broadcast_reference(x[0], t[0], &all) * broadcast_reference(x[1], t[1], &all);
        let kept: Vec<Option<usize>> = all.dims.iter().map(|d| out.position(&d.name)).collect();
        let mut y = Reference::zeros(out.shape());
        for (i, v) in product.indexed_iter() {
            let mut at = vec![0; out.dims.len()];
            kept.iter().enumerate().for_each(|(d, k)| {
                if let Some(k) = k {
                    at[*k] = i[d];
                }
            });
            y[at.as_slice()] += v;
        }
        y
    }
}

impl Tensor {
    /// The sum over the dimensions named of the products of this and `other`, dimensions matched by name:
    /// `x.contract(&w, &["d_in"])`. Of their dtype; summed in `f32`.
    #[track_caller]
    pub fn contract(&self, other: &Tensor, over: &[&str]) -> Tensor {
        self.contract_wide(other, over).cast(self.ty().dtype)
    }

    /// [`Tensor::contract`] as it was summed: `f32`, of 16-bit factors too.
    #[track_caller]
    pub fn contract_wide(&self, other: &Tensor, over: &[&str]) -> Tensor {
        self.graph().apply(Contract { over: over.iter().map(|&n| n.into()).collect() }, &[self, other])
    }
}
