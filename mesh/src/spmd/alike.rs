//! What nodes that are alike have in common, worked out once.
//!
//! A model is the same layer again and again, a step the same micro-batch, and an optimizer does the same for every variable.
//! So there are few ways in which tensors lie and few cases of ops on them, however many nodes and devices there are: each list
//! of regions is there once, and each case is decided once.

use super::{Computed, Region, Spec};
use crate::dim::{Dim, Name, Type};
use crate::error::Error;
use crate::graph::{Node, Role};
use crate::ops::Prim;
use crate::placement::{Placement, Subject};
use crate::program::Function;
use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::rc::Rc;
use std::sync::Arc;

/// How an input of a node lies.
#[derive(PartialEq, Eq, Hash)]
pub(super) struct Lies {
    pub ty: Type,
    pub spec: Rc<Spec>,
    pub stored: Option<Rc<Spec>>,
    /// What devices hold, and what was moved of it that the node may take.
    pub lists: Vec<usize>,
}

/// All that it depends on how a node is computed, but for what its op is beside its name.
#[derive(PartialEq, Eq, Hash)]
pub(super) struct Case {
    pub op: &'static str,
    pub ty: Type,
    /// Whether it is of a pass, which uses variables otherwise than they lie.
    pub passes: bool,
    pub spec: Rc<Spec>,
    pub inputs: Vec<Lies>,
}

/// What rules look at in a node.
#[derive(PartialEq, Eq, Hash)]
struct Seen {
    dims: Vec<Dim>,
    scope: Name,
    role: Role,
    own: Option<Name>,
    whole: Vec<(Name, &'static str)>,
}

/// What is known so far.
#[derive(Default)]
pub(super) struct Alike {
    /// Lists of what devices hold: equal ones are one.
    lists: RefCell<HashSet<Arc<[Region]>>>,
    /// By two lists: whether each device has in the one what it has in the other.
    inside: RefCell<HashMap<(usize, usize), bool>>,
    specs: HashMap<Seen, Rc<Spec>>,
    owned: HashMap<(Vec<Dim>, Rc<Spec>), Arc<[Region]>>,
    cases: HashMap<Case, Vec<(Prim, Rc<Computed>)>>,
    ones: Option<Arc<[usize]>>,
    /// Whether each node is worked out by itself: what is known is held to that.
    #[cfg(test)]
    forgets: bool,
}

impl Alike {
    /// The one list that is equal to this one.
    pub fn list(&self, regions: Vec<Region>) -> Arc<[Region]> {
        let mut lists = self.lists.borrow_mut();
        if let Some(known) = lists.get(regions.as_slice()) {
            return known.clone();
        }
        let list: Arc<[Region]> = regions.into();
        lists.insert(list.clone());
        list
    }

    /// What tells a list of [`Alike::list`] from the others.
    pub fn number(&self, list: &Arc<[Region]>) -> usize {
        list.as_ptr() as usize
    }

    /// Whether every device holds at least what it has in the list `inner`.
    pub fn inside(&self, held: &Arc<[Region]>, inner: &Arc<[Region]>) -> bool {
        let both = (self.number(held), self.number(inner));
        let all = || held.iter().zip(&**inner).all(|(h, n)| h.contains(n));
        both.0 == both.1 || *self.inside.borrow_mut().entry(both).or_insert_with(all)
    }

    /// 1 for every device.
    pub fn ones(&mut self, devices: usize) -> Arc<[usize]> {
        self.ones.get_or_insert_with(|| vec![1; devices].into()).clone()
    }

    /// [`Placement::spec`] of a node.
    pub fn spec(&mut self, placement: &Placement, function: &Function, node: &Node) -> Result<Rc<Spec>, Error> {
        let subject = Subject::node(function, node);
        let seen = Seen {
            dims: node.ty.dims.clone(),
            scope: node.scope.clone(),
            role: node.role,
            own: node.layout.clone(),
            whole: subject.whole.clone(),
        };
        #[cfg(test)]
        if self.forgets {
            return placement.spec(&subject).map(Rc::new);
        }
        if let Some(spec) = self.specs.get(&seen) {
            return Ok(spec.clone());
        }
        let spec = Rc::new(placement.spec(&subject)?);
        self.specs.insert(seen, spec.clone());
        Ok(spec)
    }

    /// [`Placement::regions`].
    pub fn regions(&mut self, placement: &Placement, ty: &Type, spec: &Rc<Spec>) -> Arc<[Region]> {
        let key = (ty.dims.clone(), spec.clone());
        if let Some(known) = self.owned.get(&key) {
            return known.clone();
        }
        let list = self.list(placement.regions(ty, spec));
        self.owned.insert(key, list.clone());
        list
    }

    /// How an op was computed in this case.
    pub fn known(&self, case: &Case, op: &Prim) -> Option<Rc<Computed>> {
        #[cfg(test)]
        if self.forgets {
            return None;
        }
        self.cases.get(case)?.iter().find(|(known, _)| known == op).map(|(_, computed)| computed.clone())
    }

    /// Keeps how an op is computed in this case.
    pub fn learn(&mut self, case: Case, op: Prim, computed: Computed) -> Rc<Computed> {
        let computed = Rc::new(computed);
        self.cases.entry(case).or_default().push((op, computed.clone()));
        computed
    }
}

#[cfg(test)]
mod tests {
    use super::super::{SpmdProgram, lower_with};
    use super::*;
    use crate::dim::{DType, dim};
    use crate::layout::{Layout, Mesh};
    use crate::nn::{self, Dense};
    use crate::optim::Optimizer;
    use crate::program::{Program, ProgramBuilder};

    /// So many layers that are alike, to be trained.
    fn layers(count: usize) -> Program {
        let mut p = ProgramBuilder::new();
        p.function("train", |g| {
            let (model, wide) = (dim("model", 96), dim("wide", 256));
            let mut x = g.input("x", DType::F32, &[dim("batch", 16), model.clone()]);
            for i in 0..count {
                x = g.scoped(format!("layer.{i}"), || {
                    let y = nn::dense(&x, "up", &["model"], std::slice::from_ref(&wide), &Dense::default()).relu();
                    nn::dense(&y, "down", &["wide"], std::slice::from_ref(&model), &Dense::default())
                });
            }
            let loss = x.mean(&["batch", "model"]);
            Optimizer::adamw(1e-3, 0.01).clipped(1.0).apply(g, &loss);
            g.output("loss", &loss);
        })
        .unwrap();
        p.finish().unwrap()
    }

    fn lowered(alike: &mut Alike, p: &Program, mesh: &str, layout: &str) -> SpmdProgram {
        let (mesh, layout): (Mesh, Layout) = (mesh.parse().unwrap(), layout.parse().unwrap());
        lower_with(alike, p.function("train").unwrap(), &Placement::new(&mesh, &layout, p)).unwrap()
    }

    /// All that a program says.
    fn text(p: &SpmdProgram) -> String {
        let mut kept: Vec<_> = p.kept.iter().collect();
        kept.sort();
        let edges = (&p.inputs, &p.reads, &p.outputs, &p.assigns, &p.sums);
        format!("{:?} {:?} {edges:?} {kept:?}", p.values, p.instrs)
    }

    const LAYOUTS: [(&str, &str); 6] = [
        ("data=4", "batch:data"),
        ("data=3", "batch:data,model:data?"),
        ("data=2,model=2", "batch:data,wide:model"),
        ("data=4", "batch:data,variables{*:data},slots{*:data},gradients{*:data}"),
        ("data=2,model=3", "batch:data,wide:model,model:model?,slots{*:data}"),
        ("pipe=2,data=2", "@pipe:1,layer.0/**{@pipe:0},layer.1/**{@pipe:0},batch:data"),
    ];

    #[test]
    fn what_is_worked_out_once_is_what_each_node_comes_to_by_itself() {
        let p = layers(3);
        for (mesh, layout) in LAYOUTS {
            let mut forgets = Alike { forgets: true, ..Alike::default() };
            let [once, each] = [&mut Alike::default(), &mut forgets].map(|alike| lowered(alike, &p, mesh, layout));
            assert_eq!(text(&once), text(&each), "{layout} on {mesh}");
        }
    }

    #[test]
    fn more_layers_are_no_more_cases_nor_lists() {
        for (mesh, layout) in LAYOUTS {
            let worked_out = |count: usize| {
                let (p, mut alike) = (layers(count), Alike::default());
                lowered(&mut alike, &p, mesh, layout);
                (alike.cases.values().map(Vec::len).sum::<usize>(), alike.lists.borrow().len())
            };
            assert_eq!(worked_out(6), worked_out(12), "{layout} on {mesh}");
        }
    }
}
