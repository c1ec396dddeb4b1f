//! Gradients of one value by several products alike are one product.
//!
//! Queries, keys and values are products of one `x`, and the gradient of `x` is the sum of three products over the same
//! dimensions, `Σ_i Σ_j dy_i[.., j] · w_i[.., j]`. Where `j` is split, each of the three would be finished by an all-reduce of
//! its own, and then they would be added. To add before that is another order of the sum, and bits must not depend on a
//! layout; so the order is this one everywhere: the factors lie side by side along a dimension of their own, [`SIDE`], which
//! is a single chunk, and the sum over both dimensions has one tree, whose leaves add up all products. One device makes one
//! long product in place of several short ones; several finish one sum.

use super::{Graph, NodeId, State, Tensor};
use crate::dim::{Name, Type, dim};
use crate::ops::Prim;
use crate::ops::contract::Contract;
use crate::ops::movement::Concat;
use crate::placement::parent;
use std::collections::HashMap;

/// The dimension along which factors lie side by side.
pub const SIDE: &str = "product.side";

/// What products have in common that are made one: the value, what it is summed over with, the result, and the layer that
/// they are in.
type Alike = (NodeId, Vec<Name>, Type, Type, Name, Option<usize>);

/// The gradients of values by products alike, while a backward pass is built.
pub(super) struct Products {
    /// By product: which ones it is alike.
    of: HashMap<NodeId, usize>,
    groups: Vec<Group>,
}

struct Group {
    /// The value, and the first of the products.
    input: NodeId,
    product: NodeId,
    /// Products whose gradients are still to come.
    missing: usize,
    /// Gradients that wait for the others.
    waiting: Vec<Tensor>,
}

impl Products {
    /// Finds the products alike among the nodes that have gradients, each in a region or in none.
    pub fn of(s: &State, wanted: &[bool], regions: &[Option<usize>]) -> Products {
        let mut found: HashMap<Alike, Vec<NodeId>> = HashMap::new();
        for (i, node) in s.nodes.iter().enumerate().filter(|(i, _)| wanted[*i]) {
            let (id, ty) = (NodeId(i as u32), node.ty.clone());
            let (Prim::Contract(c), [x, w]) = (&node.op, &node.inputs[..]) else { continue };
            // Uses of a variable may be far apart.
            let variable = matches!(s.nodes[x.index()].op, Prim::Read(_));
            if !variable && x != w && wanted[x.index()] && !s.custom.contains_key(&id) {
                let weight = s.nodes[w.index()].ty.clone();
                let alike = (*x, c.over.clone(), weight, ty, parent(&node.scope).into(), regions[i]);
                found.entry(alike).or_default().push(id);
            }
        }
        let (mut of, mut groups) = (HashMap::new(), vec![]);
        let mut found: Vec<(NodeId, Vec<NodeId>)> = found.into_iter().map(|((input, ..), ids)| (input, ids)).collect();
        found.sort_by_key(|(_, ids)| ids[0]);
        for (input, ids) in found.into_iter().filter(|(_, ids)| ids.len() > 1) {
            of.extend(ids.iter().map(|id| (*id, groups.len())));
            groups.push(Group { input, product: ids[0], missing: ids.len(), waiting: vec![] });
        }
        Products { of, groups }
    }

    /// Takes a node's gradient of one of its inputs. Gives what of the input's gradient is complete with it: that one, or that
    /// of all products alike; None while there are some to come.
    pub fn take(&mut self, node: NodeId, input: NodeId, grad: Tensor) -> Option<Tensor> {
        let Some(group) = self.of.get(&node).map(|g| &mut self.groups[*g]).filter(|g| g.input == input) else {
            return Some(grad);
        };
        group.missing -= 1;
        group.waiting.push(grad);
        if group.missing > 0 { None } else { group.sum() }
    }

    /// What is known of a value's gradient when there are none to come.
    pub fn rest(&mut self, input: NodeId) -> Vec<Tensor> {
        self.groups.iter_mut().filter(|g| g.input == input).filter_map(Group::sum).collect()
    }
}

impl Group {
    /// The sum of the gradients that wait: one product, if they are products alike. That is made where each would be; a stage
    /// of a pipeline hands on what it makes of them, and not what it makes it of.
    fn sum(&mut self) -> Option<Tensor> {
        let grads = std::mem::take(&mut self.waiting);
        let graph = grads.first()?.graph.clone();
        let product = graph.beside(self.product, || one_product(&graph, &grads));
        product.or_else(|| graph.beside(self.input, || grads.into_iter().reduce(|a, b| a.add(&b))))
    }
}

fn one_product(graph: &Graph, grads: &[Tensor]) -> Option<Tensor> {
    let parts: Vec<(Contract, [Tensor; 2])> = grads.iter().map(factors).collect::<Option<_>>()?;
    let (contract, first) = parts.first().filter(|_| parts.len() > 1)?;
    let same = |(c, f): &(Contract, [Tensor; 2])| c == contract && [0, 1].iter().all(|i| f[*i].ty() == first[*i].ty());
    if !parts.iter().all(same) || first.iter().any(|f| f.ty().has(SIDE) || f.ty().dims.is_empty()) {
        return None;
    }
    graph.grain(SIDE, parts.len());
    let side_by_side = |i: usize| {
        let each = |(_, factors): &(Contract, [Tensor; 2])| {
            let outer = factors[i].ty().dims.remove(0);
            factors[i].split_dim(&outer.name, &[dim(SIDE, 1), outer.clone()])
        };
        let each: Vec<Tensor> = parts.iter().map(each).collect();
        graph.apply(Concat { dim: SIDE.into() }, &each.iter().collect::<Vec<_>>())
    };
    let over = [SIDE.into()].into_iter().chain(contract.over.iter().cloned()).collect();
    let wide = graph.apply(Contract { over }, &[&side_by_side(0), &side_by_side(1)]);
    Some(wide.cast(grads[0].ty().dtype))
}

/// The product that a gradient is, rounded at the most, and its factors.
fn factors(grad: &Tensor) -> Option<(Contract, [Tensor; 2])> {
    let wide = grad.cast_from().unwrap_or(grad.clone());
    let s = grad.graph.0.borrow();
    let node = &s.nodes[wide.id.index()];
    match (&node.op, &node.inputs[..]) {
        (Prim::Contract(c), [a, b]) => Some((c.clone(), [*a, *b].map(|id| grad.graph.tensor(id)))),
        _ => None,
    }
}
