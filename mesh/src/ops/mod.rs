//! The primitive ops: one file and one line of the table each.

pub mod binary;
pub mod broadcast;
pub mod cast;
pub mod compare;
pub mod contract;
pub mod conv;
pub mod gather;
pub mod max_pool;
pub mod movement;
pub mod reduce;
pub mod resize;
pub mod rows;
pub mod scatter_add;
pub mod select;
pub mod source;
pub mod split;
pub mod top_k;
pub mod unary;
pub mod window;
pub mod window_sum;

use crate::op::Op;

macro_rules! table {
    ($($(#[$doc:meta])* $variant:ident($ty:ty)),* $(,)?) => {
        /// An op: the closed set that programs consist of.
        #[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
        pub enum Prim { $($(#[$doc])* $variant($ty)),* }

        impl Prim {
            /// What there is to say about the op.
            pub fn op(&self) -> &dyn Op {
                match self { $(Prim::$variant(op) => op),* }
            }
        }
        impl Prim {
            /// The names of all lines of the table.
            pub const KINDS: &'static [&'static str] = &[$(stringify!($variant)),*];

            /// The name of its line in the table.
            pub fn kind(&self) -> &'static str {
                match self { $(Prim::$variant(_) => stringify!($variant)),* }
            }

            /// Whether it is a sum of products: what most of a network's arithmetic is.
            pub fn is_product(&self) -> bool {
                matches!(self, Prim::Contract(_) | Prim::Conv(_) | Prim::ConvTranspose(_) | Prim::ConvWeightGrad(_))
            }
        }
        $(impl From<$ty> for Prim {
            fn from(op: $ty) -> Prim { Prim::$variant(op) }
        })*
    };
}

table! {
    /// A feed.
    Input(source::Input),
    /// A variable's value at the function's start.
    Read(source::Read),
    /// A variable's value from the function's end on.
    Assign(source::Assign),
    /// A scalar constant.
    Constant(source::Constant),
    /// The number of the step.
    Step(source::Step),
    /// 0, 1, 2, ..
    Iota(source::Iota),
    /// Counter-based random numbers.
    Random(source::Random),
    /// A function of one value.
    Unary(unary::Unary),
    /// A function of two values.
    Binary(binary::Binary),
    /// A comparison.
    Compare(compare::Compare),
    /// One of two values by a condition.
    Select(select::Select),
    /// Another dtype.
    Cast(cast::Cast),
    /// More dimensions.
    Broadcast(broadcast::Broadcast),
    /// Sum, maximum or minimum over dimensions.
    Reduce(reduce::Reduce),
    /// Sum of products.
    Contract(contract::Contract),
    /// Convolution.
    Conv(conv::Conv),
    /// Transposed convolution.
    ConvTranspose(conv::ConvTranspose),
    /// Gradient of a convolution by its filter.
    ConvWeightGrad(conv::ConvWeightGrad),
    /// Largest value of each window.
    MaxPool(max_pool::MaxPool),
    /// Its gradient.
    MaxPoolGrad(max_pool::MaxPoolGrad),
    /// Sum of each window along a dimension.
    WindowSum(window_sum::WindowSum),
    /// A dimension sampled at another number of places.
    Resize(resize::ResizeDim),
    /// Elements of a table by index.
    Gather(gather::Gather),
    /// Sums by index.
    ScatterAdd(scatter_add::ScatterAdd),
    /// Indices of the largest elements.
    TopK(top_k::TopK),
    /// Another name for a dimension.
    Rename(movement::Rename),
    /// A dimension as several.
    SplitDim(split::SplitDim),
    /// Several dimensions as one.
    MergeDims(split::MergeDims),
    /// Some elements of a dimension.
    Slice(movement::Slice),
    /// More elements of one value.
    Pad(movement::Pad),
    /// One after another.
    Concat(movement::Concat),
    /// Moved along a dimension.
    Shift(movement::Shift),
}
