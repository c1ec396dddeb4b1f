//! Mixture of experts: each position goes to the few experts that a router chooses for it (Shazeer et al. 2017; GShard,
//! Lepikhin et al. 2020; Switch Transformer, Fedus et al. 2021).

use super::{Dense, dense, softmax};
use crate::dim::{DType, Dim, Name, dim};
use crate::graph::Tensor;
use crate::program::Init;

/// Options of a mixture of experts.
#[derive(Clone, Debug, PartialEq)]
pub struct Mixture {
    /// The experts.
    pub experts: Dim,
    /// How many of them each position goes to: 1 in Switch Transformers, 2 in GShard.
    pub choices: usize,
    /// Places that an expert has for a group's positions, as a multiple of what it would have if all got equally many.
    pub capacity: f32,
    /// How the router's kernel starts.
    pub init: Init,
}

impl Mixture {
    /// Places that each expert has for a group of so many positions: at least one, and no more than there are positions.
    pub fn places(&self, positions: usize) -> usize {
        let even = (positions * self.choices) as f32 / self.experts.size.max(1) as f32;
        ((even * self.capacity).ceil() as usize).clamp(1, positions.max(1))
    }
}

/// What a mixture of experts gives.
pub struct Mixed {
    /// The experts' results, weighted and added up; 0 for a position that no expert had a place for. Of x' dtype.
    pub y: Tensor,
    /// How unevenly positions are spread, an `f32` scalar: `experts · Σ f·P`, the mean over groups, where an expert is the
    /// first choice of the share `f` of a group's positions and gets the mean probability `P`. It is 1 if all are even; added
    /// to the loss, times 0.01 or so, it keeps them so (Fedus et al. 2021, equation 4; GShard's algorithm 1).
    pub balance: Tensor,
    /// Choices that were dropped, of all positions together, because the expert had no place left; an `i32` scalar.
    pub dropped: Tensor,
}

/// The dimensions of a position's choices and of an expert's places.
const CHOICE: &str = "choice";
const PLACE: &str = "place";

/// Sends each position of `x` to some of `options.experts` and adds up, by the router's weights, what `expert` makes of it.
///
/// `x` has the dimensions `positions` and `model`. Positions compete for places within a group, and each element of x'
/// other dimensions (of `batch`) is a group: who is dropped depends on the program alone. First choices get places before
/// second ones, and earlier positions before later ones. A weight is the router's probability, divided, where a
/// position goes to several experts, by the sum of theirs.
///
/// `expert` is called once, in the scope `experts`, with `[experts, .., place, model]`, of which it may change `model`;
/// [`Dense::each`] gives each expert weights of its own. The router's variable is `router/kernel`.
///
/// Outside of that scope the experts are called `routed_<experts>`: routing and sums lie as the positions do, and a rule
/// for `experts` splits what they compute. Between the two is one all-to-all of the places there and one back.
#[track_caller]
pub fn mixture(
    x: &Tensor,
    name: &str,
    [positions, model]: [&str; 2],
    options: &Mixture,
    expert: impl FnOnce(&Tensor) -> Tensor,
) -> Mixed {
    let g = x.graph();
    let (all, dtype) = (x.dim(positions), x.ty().dtype);
    let experts = &*options.experts.name;
    let routed = options.experts.named(format!("routed_{experts}"));
    g.layer(name, || {
        let router = Dense::unbiased().starting(options.init.clone());
        let shares = dense(&x.cast(DType::F32), "router", &[model], std::slice::from_ref(&routed), &router);
        let shares = softmax(&shares, &[&routed.name]);
        let choice = dim(CHOICE, options.choices);
        let (_, chosen) = shares.stop_gradient().top_k(&routed.name, &choice);
        let choices = g.scalar_i32(options.choices.try_into().unwrap_or(i32::MAX));
        // The first choice counts most, and what is not chosen 0.
        let rank = choices.sub(&g.iota(&choice)).broadcast(&chosen.ty().dims);
        let rank = rank.scatter_add_over(&chosen, &routed, &[CHOICE]);

        // Who comes first: above 0 where chosen.
        let turn = rank.mul(&g.scalar_i32(all.size.try_into().unwrap_or(i32::MAX))).sub(&g.iota(&all));
        let (turn, who) = turn.top_k(positions, &dim(PLACE, options.places(all.size)));
        let taken = turn.greater(&g.scalar_i32(0));
        let who = taken.select(&who, &g.scalar_i32(-1));
        // An expert's rows lie together.
        let ty = who.ty();
        let others = ty.dims.iter().map(|d| &*d.name).filter(|n| *n != &*routed.name);
        let who = who.reorder(&std::iter::once(&*routed.name).chain(others).collect::<Vec<_>>());

        let zero = g.scalar(0.0);
        let kept = rank.greater(&g.scalar_i32(0)).select(&shares, &zero);
        let weights = if options.choices > 1 { kept.div(&kept.sum(&[&routed.name])) } else { kept };
        // Multiplied where the experts are, so that the gradient of the weights does not need their results elsewhere.
        let weights = weights.gather(&who, positions).cast(dtype).rename(&routed.name, experts);
        let sent = x.gather(&who, positions).rename(&routed.name, experts);
        let made = g.scoped("experts", || expert(&sent).mul(&weights)).rename(experts, &routed.name);
        let y = made.cast(DType::F32).scatter_add_over(&who, &all, &[&*routed.name, PLACE]);
        let order: Vec<Name> = x.ty().dims.into_iter().map(|d| d.name).filter(|n| y.ty().has(n)).collect();
        let y = y.reorder(&order.iter().map(|n| &**n).collect::<Vec<_>>()).cast(dtype);

        let first = rank.equal(&choices).cast(DType::F32).mean(&[positions]);
        let uneven = first.mul(&shares.mean(&[positions])).sum(&[&*routed.name]);
        let balance = uneven.mul_scalar(options.experts.size as f32).mean_all();
        let wanted = g.scalar_i32(chosen.ty().elements().try_into().unwrap_or(i32::MAX));
        Mixed { y, balance, dropped: wanted.sub(&taken.cast(DType::I32).sum_all()) }
    })
}
