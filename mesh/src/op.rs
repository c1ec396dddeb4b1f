//! What an op is: everything there is to say about it, in one file of [`crate::ops`] each.

use crate::chunk::Tree;
use crate::dim::{Dim, Name, Type};
use crate::error::Refusal;
use crate::graph::Tensor;
use crate::region::Region;
use ndarray::ArrayD;

/// Host array in which the reference evaluation computes, whatever the dtype: exact for `i32` and `bool`
/// (0 or 1), and precise enough in place of `f32` that finite differences mean something.
pub type Reference = ArrayD<f64>;

/// What an op's gradient rule sees.
pub struct GradContext {
    /// The op's inputs.
    pub inputs: Vec<Tensor>,
    /// The op's result.
    pub output: Tensor,
    /// The gradient of the loss by the result; of the result's type.
    pub dy: Tensor,
}

/// A primitive op.
///
/// An op iterates over the dimensions of its result and over those of [`Op::reduced`]; [`Op::needs`] says which part
/// of an input a part of that iteration space reads. That is its sharding rule: a device computes the part of the
/// result that it owns, whatever it must read for it is fetched (halo, gather, nothing), and where a reduced
/// dimension is split the partial sums are finished by a collective.
pub trait Op: std::fmt::Debug {
    /// Its name in plans and errors.
    fn name(&self) -> &'static str;
    /// Whether it takes so many inputs.
    fn takes(&self, inputs: usize) -> bool {
        inputs == 1
    }
    /// The result's type, or which numbered constraint the inputs break.
    fn infer(&self, inputs: &[&Type]) -> Result<Type, Refusal>;
    /// The gradients of the inputs; None where none flows.
    fn grad(&self, cx: &GradContext) -> Vec<Option<Tensor>>;
    /// The dimensions that are summed over (or maximised), in the order of the summation tree.
    fn reduced(&self, inputs: &[&Type]) -> Vec<Dim> {
        let _ = inputs;
        vec![]
    }
    /// The region of input `i` that the iteration region `at` (over the result's and the reduced dimensions) reads.
    /// As given here: the same range in dimensions of the same name, all of the others.
    fn needs(&self, i: usize, inputs: &[&Type], output: &Type, at: &Region) -> Region {
        let _ = output;
        at.of(inputs[i])
    }
    /// Dimensions that the op takes or gives whole, whatever the layout says, each with the reason. One of the result is
    /// not split there, its rule is ignored; one of the inputs alone is gathered where it is split.
    fn whole(&self, inputs: &[&Type], output: &Type) -> Vec<(Name, &'static str)> {
        let _ = (inputs, output);
        vec![]
    }
    /// Floating-point operations for inputs and a result of these (local) types; a multiply-add counts two.
    fn flops(&self, inputs: &[&Type], output: &Type) -> u64;
    /// Which share of those kernels do for whole tensors, summed along `tree`: less than 1 where they come to the same by
    /// fewer.
    fn kernel_share(&self, inputs: &[&Type], output: &Type, tree: Option<&Tree>) -> f64 {
        let _ = (inputs, output, tree);
        1.0
    }
    /// Whether each element of the result is a function of the elements at the same names' indices of the inputs.
    fn elementwise(&self) -> bool {
        false
    }
    /// Whether the result only holds elements of the inputs (and padding), so that making it again costs a copy.
    fn copies(&self) -> bool {
        false
    }
    /// The meaning of the op, evaluated by scalar loops over whole tensors.
    fn reference(&self, inputs: &[&Reference], types: &[&Type], output: &Type) -> Reference;
}
