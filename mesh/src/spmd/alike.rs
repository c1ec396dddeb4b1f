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
        self.cases.get(case)?.iter().find(|(known, _)| known == op).map(|(_, computed)| computed.clone())
    }

    /// Keeps how an op is computed in this case.
    pub fn learn(&mut self, case: Case, op: Prim, computed: Computed) -> Rc<Computed> {
        let computed = Rc::new(computed);
        self.cases.entry(case).or_default().push((op, computed.clone()));
        computed
    }
}
