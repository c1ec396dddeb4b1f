//! The graph and its builder: [`Tensor`] handles with methods that chain.
//!
//! A method never fails on the spot. The first mistake is kept with its place in the user's source and returned by
//! [`crate::program::ProgramBuilder::function`]; what is built after it does not matter any more.

use crate::dim::{DType, Dim, Name, Type};
use crate::error::{Cause, Error, Place};
use crate::layout::Section;
use crate::op::GradContext;
use crate::ops::{self, Prim};
use crate::program::{Block, Init, VarId, Variable, Variables};
use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::rc::Rc;

mod products;
use products::Products;
pub use products::SIDE;

/// Index of a node in its graph; inputs come before their users.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct NodeId(pub u32);

impl NodeId {
    /// As an index.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// What a node or a variable is for: layouts may have rules for each.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum Role {
    /// A part of the forward pass.
    #[default]
    Forward,
    /// A part of the backward pass, what it makes again included.
    Backward,
    /// The gradient of a variable, or a variable in which it is added up.
    Gradient,
    /// A part of an optimizer's update, or one of its slots.
    Update,
    /// A variable, trained or not, or its start.
    Variable,
}

impl Role {
    /// All of them.
    pub const ALL: [Role; 5] = [Role::Forward, Role::Backward, Role::Gradient, Role::Update, Role::Variable];

    /// The section of a layout whose rules are for it.
    pub fn section(self) -> Section {
        match self {
            Role::Forward | Role::Backward => Section::Activations,
            Role::Gradient => Section::Gradients,
            Role::Update => Section::Slots,
            Role::Variable => Section::Variables,
        }
    }
}

/// An op applied to inputs.
#[derive(Clone, Debug)]
pub struct Node {
    /// The op.
    pub op: Prim,
    /// Its inputs.
    pub inputs: Vec<NodeId>,
    /// Type of its result.
    pub ty: Type,
    /// Where the user's source made it.
    pub place: Place,
    /// Path of the scopes around it: `encoder.0/conv`.
    pub scope: Name,
    /// Layout rules for this tensor alone, as text (`"x:x, channel:model"`).
    pub layout: Option<Name>,
    /// What it is for.
    pub role: Role,
}

type CustomGrad = Rc<dyn Fn(&Tensor) -> Vec<Option<Tensor>>>;
type Renaming = Rc<dyn Fn(&str) -> String>;

pub(crate) struct State {
    pub nodes: Vec<Node>,
    pub variables: Rc<RefCell<Variables>>,
    pub inputs: Vec<(Name, NodeId)>,
    pub outputs: Vec<(Name, NodeId)>,
    pub assigns: Vec<(VarId, NodeId)>,
    pub reads: HashMap<VarId, NodeId>,
    scopes: Vec<Name>,
    /// What the nodes are for that are made now.
    role: Role,
    renamings: Vec<Renaming>,
    pub error: Option<Error>,
    custom: HashMap<NodeId, (Vec<NodeId>, CustomGrad)>,
    /// The region that is open.
    region: Option<usize>,
    regions: Vec<Region>,
    randoms: HashMap<Name, u32>,
    place: Option<Place>,
    backward: Option<Backward>,
}

/// A part of the forward pass that the backward pass may make again.
struct Region {
    /// The block that it is; None where the model asks for it itself.
    block: Option<Name>,
    /// Whether it is made again.
    again: bool,
    /// What it consists of.
    nodes: Range<usize>,
    /// Of that, what would go if it were made again; known once there is a backward pass.
    inside: Vec<NodeId>,
}

/// State while a backward pass is built: forward values that are cheap to make again are made again instead of kept.
struct Backward {
    boundary: NodeId,
    /// The region whose gradients are built.
    region: Option<usize>,
    /// By value and by the region that it is made again for. What a region takes is made again for each by itself: it
    /// would be kept from the first one of them to the last.
    /// What a spreading product is made into (see [`State::is_spread`]) is made once more where a forward sum of it is,
    /// since the gradients of what follows that sum come before the other use, and it would be kept for them meanwhile.
    clones: HashMap<(NodeId, Option<usize>, bool), NodeId>,
}

/// A graph under construction. Cheap to clone: all clones are the same graph.
#[derive(Clone)]
pub struct Graph(pub(crate) Rc<RefCell<State>>);

/// A value of the graph.
#[derive(Clone)]
pub struct Tensor {
    graph: Graph,
    id: NodeId,
}

impl Graph {
    pub(crate) fn new(variables: Rc<RefCell<Variables>>) -> Graph {
        Graph(Rc::new(RefCell::new(State {
            nodes: vec![],
            variables,
            inputs: vec![],
            outputs: vec![],
            assigns: vec![],
            reads: HashMap::new(),
            scopes: vec![],
            role: Role::Forward,
            renamings: vec![],
            error: None,
            custom: HashMap::new(),
            region: None,
            regions: vec![],
            randoms: HashMap::new(),
            place: None,
            backward: None,
        })))
    }

    /// The path of the scopes that are open.
    pub fn scope(&self) -> Name {
        let s = self.0.borrow();
        s.scopes.iter().map(|n| &**n).collect::<Vec<_>>().join("/").into()
    }

    /// Runs `build` inside the scope `name`: variables and nodes made there carry its path.
    pub fn scoped<T>(&self, name: impl Into<Name>, build: impl FnOnce() -> T) -> T {
        self.0.borrow_mut().scopes.push(name.into());
        let out = build();
        self.0.borrow_mut().scopes.pop();
        out
    }

    /// [`Graph::scoped`] for the inside of a layer: what `build` makes counts as made by the layer's caller.
    #[track_caller]
    pub(crate) fn layer<T>(&self, name: impl Into<Name>, build: impl FnOnce() -> T) -> T {
        let place = self.place();
        let outer = self.0.borrow_mut().place.replace(place);
        let out = self.scoped(name, build);
        self.0.borrow_mut().place = outer;
        out
    }

    /// The caller's place, or that of the caller of the layer that is being built.
    #[track_caller]
    fn place(&self) -> Place {
        self.0.borrow().place.unwrap_or(Place::here())
    }

    /// [`Graph::scoped`] with `path` in place of the scopes that are open: what belongs to a variable (its gradient's
    /// use, its optimizer slots) goes where the variable is.
    pub fn scoped_at<T>(&self, path: impl Into<Name>, build: impl FnOnce() -> T) -> T {
        let outer = std::mem::replace(&mut self.0.borrow_mut().scopes, vec![path.into()]);
        let out = build();
        self.0.borrow_mut().scopes = outer;
        out
    }

    /// Runs `build`, whose nodes and variables are for `role`.
    pub(crate) fn with_role<T>(&self, role: Role, build: impl FnOnce() -> T) -> T {
        let outer = std::mem::replace(&mut self.0.borrow_mut().role, role);
        let out = build();
        self.0.borrow_mut().role = outer;
        out
    }

    /// Runs `build`, whose variables have the names that `rename` makes of their paths: how layers share variables.
    /// Scopes, and with them random numbers, are as without.
    pub fn renamed<T>(&self, rename: impl Fn(&str) -> String + 'static, build: impl FnOnce() -> T) -> T {
        self.0.borrow_mut().renamings.push(Rc::new(rename));
        let out = build();
        self.0.borrow_mut().renamings.pop();
        out
    }

    /// Runs `build`, whose values are made again in the backward pass instead of kept for it. Kept is what goes into the
    /// region, what leaves it (or what that is cheaply made from), and sums that are small beside what they are made
    /// from. Regions do not nest: the outermost one counts.
    pub fn recompute<T>(&self, build: impl FnOnce() -> T) -> T {
        self.region(None, true, build)
    }

    /// Runs `build`, a part of the network that [`Graph::recompute`] may be chosen for: it is where the program is built
    /// with the block's name among those to recompute ([`ProgramBuilder::recomputing`]). A name goes below the open
    /// scopes, as `encoder/layer.0`; it opens none itself.
    ///
    /// [`ProgramBuilder::recomputing`]: crate::program::ProgramBuilder::recomputing
    pub fn block<T>(&self, name: &str, build: impl FnOnce() -> T) -> T {
        let scope = self.scope();
        let name: Name = if scope.is_empty() { name.into() } else { format!("{scope}/{name}").into() };
        let again = self.0.borrow().variables.borrow().recompute.contains(&name);
        self.region(Some(name), again, build)
    }

    fn region<T>(&self, block: Option<Name>, again: bool, build: impl FnOnce() -> T) -> T {
        {
            let mut s = self.0.borrow_mut();
            if s.region.is_some() {
                drop(s);
                return build();
            }
            let (at, begin) = (s.regions.len(), s.nodes.len());
            s.region = Some(at);
            s.regions.push(Region { block, again, nodes: begin..begin, inside: vec![] });
        }
        let out = build();
        let mut s = self.0.borrow_mut();
        let end = s.nodes.len();
        if let Some(region) = s.region.take() {
            s.regions[region].nodes.end = end;
        }
        drop(s);
        out
    }

    /// Notes a mistake; the first one counts.
    pub fn fail(&self, error: Error) {
        self.0.borrow_mut().error.get_or_insert(error);
    }

    /// Applies an op. A refusal is noted and a scalar stands in for the result.
    #[track_caller]
    pub fn apply(&self, op: impl Into<Prim>, inputs: &[&Tensor]) -> Tensor {
        let ids: Vec<NodeId> = inputs.iter().map(|t| t.id).collect();
        self.push(op.into(), &ids, self.place())
    }

    fn push(&self, op: Prim, inputs: &[NodeId], place: Place) -> Tensor {
        let scope = self.scope();
        let inputs: Vec<NodeId> = inputs.iter().map(|&i| self.again(i, false)).collect();
        let mut s = self.0.borrow_mut();
        let ty = {
            let types: Vec<&Type> = inputs.iter().map(|i| &s.nodes[i.index()].ty).collect();
            let inferred = op.op().infer(&types).and_then(|ty| match ty.duplicate() {
                None => Ok(ty),
                Some(n) => crate::error::refuse(
                    "C0",
                    format!("would give {ty}, with `{n}` twice"),
                    format!("rename one `{n}` first"),
                ),
            });
            match inferred {
                Ok(ty) => ty,
                Err(refusal) => {
                    let mut e = Error::new(Cause::Op { op: op.op().name(), refusal }).at(place);
                    e = types.iter().enumerate().fold(e, |e, (i, t)| e.note(format!("input {i} is {t}")));
                    if !scope.is_empty() {
                        e = e.note(format!("in scope `{scope}`"));
                    }
                    s.error.get_or_insert(e);
                    Type::scalar(DType::F32)
                }
            }
        };
        let id = NodeId(s.nodes.len() as u32);
        let role = s.role;
        s.nodes.push(Node { op, inputs, ty, place, scope, layout: None, role });
        drop(s);
        Tensor { graph: self.clone(), id }
    }

    /// In a backward pass: the value to use in place of the forward value `id`, for a gradient or to make a forward sum
    /// again.
    fn again(&self, id: NodeId, summed: bool) -> NodeId {
        let (node, key, summed) = {
            let s = self.0.borrow();
            let Some(b) = &s.backward else { return id };
            if id >= b.boundary {
                return id;
            }
            let key = (id, b.region, summed && s.is_spread(id));
            if let Some(&c) = b.clones.get(&key) {
                return c;
            }
            if !s.is_remade(id) {
                return id;
            }
            let node = s.nodes[id.index()].clone();
            let sums = matches!(node.op, Prim::Reduce(_) | Prim::Contract(_)) && !s.is_spread(id);
            (node, key, summed || sums)
        };
        let inputs: Vec<NodeId> = node.inputs.iter().map(|&i| self.again(i, summed)).collect();
        let mut s = self.0.borrow_mut();
        let clone = NodeId(s.nodes.len() as u32);
        s.nodes.push(Node { inputs, role: Role::Backward, ..node });
        if let Some(b) = &mut s.backward {
            b.clones.insert(key, clone);
        }
        clone
    }

    /// The tensor that a node computes.
    pub(crate) fn tensor(&self, id: NodeId) -> Tensor {
        Tensor { graph: self.clone(), id }
    }

    /// A feed of the function: the caller gives it a value every time.
    #[track_caller]
    pub fn input(&self, name: impl Into<Name>, dtype: DType, dims: &[Dim]) -> Tensor {
        let name = name.into();
        if self.0.borrow().inputs.iter().any(|(n, _)| *n == name) {
            self.fail(Error::new(Cause::TwiceNamed { what: "inputs", name: name.clone() }).at(self.place()));
        }
        let t = self.apply(ops::source::Input { name: name.clone(), ty: Type::new(dtype, dims) }, &[]);
        self.0.borrow_mut().inputs.push((name, t.id));
        t
    }

    /// A fetch of the function: the caller gets its value every time.
    #[track_caller]
    pub fn output(&self, name: impl Into<Name>, value: &Tensor) {
        let name = name.into();
        if self.0.borrow().outputs.iter().any(|(n, _)| *n == name) {
            self.fail(Error::new(Cause::TwiceNamed { what: "outputs", name: name.clone() }).at(self.place()));
        }
        self.0.borrow_mut().outputs.push((name, value.id));
    }

    /// The variable `name` (below the open scopes), declared on first use; its value at the function's start.
    #[track_caller]
    pub fn variable(&self, name: &str, dims: &[Dim], init: Init) -> Tensor {
        self.declare(name, dims, init, true)
    }

    /// A variable that optimizers leave alone: running statistics, optimizer slots, counters.
    #[track_caller]
    pub fn state(&self, name: &str, dims: &[Dim], init: Init) -> Tensor {
        self.declare(name, dims, init, false)
    }

    #[track_caller]
    fn declare(&self, name: &str, dims: &[Dim], init: Init, trainable: bool) -> Tensor {
        let scope = self.scope();
        let path = if scope.is_empty() { name.to_string() } else { format!("{scope}/{name}") };
        let renamings = self.0.borrow().renamings.clone();
        let path: Name = renamings.iter().rev().fold(path, |path, rename| rename(&path)).into();
        let role = match self.0.borrow().role {
            Role::Forward | Role::Backward | Role::Variable => Role::Variable,
            own @ (Role::Gradient | Role::Update) => own,
        };
        let (ty, place) = (Type::new(DType::F32, dims), self.place());
        let variables = self.0.borrow().variables.clone();
        let id = variables.borrow_mut().declare(Variable { name: path, ty, init, trainable, role, place });
        match id {
            Ok(id) => self.read(id),
            Err(e) => {
                self.fail(e);
                self.scalar(0.0)
            }
        }
    }

    /// The value of a variable at the function's start.
    #[track_caller]
    pub fn read(&self, id: VarId) -> Tensor {
        if let Some(&n) = self.0.borrow().reads.get(&id) {
            return self.tensor(n);
        }
        let ty = self.0.borrow().variables.borrow().list[id.index()].ty.clone();
        let t = self.apply(ops::source::Read { var: id, ty }, &[]);
        self.0.borrow_mut().reads.insert(id, t.id);
        t
    }

    /// Sets the variable that `variable` reads to `value` at the function's end. The last assignment counts.
    #[track_caller]
    pub fn assign(&self, variable: &Tensor, value: &Tensor) {
        let var = match &self.0.borrow().nodes[variable.id.index()].op {
            Prim::Read(r) => Some(r.var),
            _ => None,
        };
        match var {
            Some(var) => {
                if let Err(refusal) = ops::source::Assign::check(&variable.ty(), &value.ty()) {
                    self.fail(Error::new(Cause::Op { op: "assign", refusal }).at(self.place()));
                    return;
                }
                let names: Vec<Name> = variable.ty().dims.into_iter().map(|d| d.name).collect();
                let value = value.reorder(&names.iter().map(|n| &**n).collect::<Vec<_>>());
                let done = self.apply(ops::source::Assign { var }, &[&value]);
                let mut s = self.0.borrow_mut();
                s.assigns.retain(|(v, _)| *v != var);
                s.assigns.push((var, done.id));
            }
            None => self.fail(
                Error::new(Cause::Feed {
                    what: "assign needs a variable to assign to".into(),
                    help: "pass what `variable` returned".into(),
                })
                .at(self.place()),
            ),
        }
    }

    /// The variables that optimizers train and that this graph reads, in order of declaration.
    pub fn trainable(&self) -> Vec<(VarId, Tensor)> {
        let s = self.0.borrow();
        let vars = s.variables.borrow();
        (0..vars.list.len() as u32)
            .map(VarId)
            .filter(|v| vars.list[v.index()].trainable)
            .filter_map(|v| s.reads.get(&v).map(|&n| (v, self.tensor(n))))
            .collect()
    }

    /// Name of a variable.
    pub fn variable_name(&self, id: VarId) -> Name {
        self.0.borrow().variables.borrow().list[id.index()].name.clone()
    }

    /// The step that runs, an `i32` scalar from 0.
    #[track_caller]
    pub fn step(&self) -> Tensor {
        self.apply(ops::source::Step, &[])
    }

    /// An `f32` scalar.
    #[track_caller]
    pub fn scalar(&self, value: f32) -> Tensor {
        self.apply(ops::source::Constant { value: f64::from(value), dtype: DType::F32 }, &[])
    }

    /// An `i32` scalar.
    #[track_caller]
    pub fn scalar_i32(&self, value: i32) -> Tensor {
        self.apply(ops::source::Constant { value: f64::from(value), dtype: DType::I32 }, &[])
    }

    /// 0, 1, 2, .. along one dimension, `i32[dim]`.
    #[track_caller]
    pub fn iota(&self, dim: &Dim) -> Tensor {
        self.apply(ops::source::Iota { dim: dim.clone() }, &[])
    }

    /// Random numbers, `f32[dims]`: a function of the run's seed, the step, this call's place in the program and the
    /// element's index alone, so the same on every layout.
    #[track_caller]
    pub fn random(&self, distribution: ops::source::Distribution, dims: &[Dim]) -> Tensor {
        let scope = self.scope();
        let count = {
            let mut s = self.0.borrow_mut();
            let c = s.randoms.entry(scope.clone()).or_insert(0);
            *c += 1;
            *c
        };
        self.random_keyed(distribution, dims, crate::rng::key_of(&format!("{scope}#{count}")))
    }

    /// [`Graph::random`] with a key of the caller's.
    #[track_caller]
    pub fn random_keyed(&self, distribution: ops::source::Distribution, dims: &[Dim], key: u32) -> Tensor {
        self.apply(ops::source::Random { distribution, key, dims: dims.to_vec() }, &[])
    }

    /// Fixes the grain of a dimension: chunks of it hold at least so many elements. The largest grain asked for counts.
    pub fn grain(&self, name: impl Into<Name>, grain: usize) {
        let variables = self.0.borrow().variables.clone();
        variables.borrow_mut().chunking.raise_grain(name.into(), grain);
    }

    /// Replaces the gradient of `output`: instead of following the ops between, the backward pass calls `rule` with the
    /// gradient of `output` and takes what it returns as the gradients of `inputs`.
    pub fn with_grad(
        &self,
        inputs: &[&Tensor],
        output: &Tensor,
        rule: impl Fn(&Tensor) -> Vec<Option<Tensor>> + 'static,
    ) {
        let ids = inputs.iter().map(|t| t.id).collect();
        self.0.borrow_mut().custom.insert(output.id, (ids, Rc::new(rule)));
    }

    /// The gradients of the scalar `loss` by each of `wrt`: zeros where the loss does not depend on it.
    #[track_caller]
    pub fn gradients(&self, loss: &Tensor, wrt: &[&Tensor]) -> Vec<Tensor> {
        let place = self.place();
        if !loss.ty().dims.is_empty() {
            let what = format!("gradients need a loss without dimensions, and this one is {}", loss.ty());
            self.fail(Error::new(Cause::Feed { what, help: "take its mean or sum first".into() }).at(place));
            return wrt.iter().map(|t| t.zeros_like()).collect();
        }
        let len = self.0.borrow().nodes.len();
        let mut wanted = vec![false; len];
        wrt.iter().for_each(|t| wanted[t.id.index()] = true);
        for i in 0..len {
            let s = self.0.borrow();
            let custom = s.custom.get(&NodeId(i as u32)).map(|(ids, _)| ids.clone());
            let from = custom.as_deref().unwrap_or(&s.nodes[i].inputs);
            wanted[i] |= s.nodes[i].ty.dtype.is_float() && from.iter().any(|n| wanted[n.index()]);
        }
        let (region, mut products) = {
            let mut s = self.0.borrow_mut();
            s.close_regions();
            let region = s.region_of();
            let products = Products::of(&s, &wanted, &region);
            (region, products)
        };
        self.0.borrow_mut().backward =
            Some(Backward { boundary: NodeId(len as u32), region: None, clones: HashMap::new() });
        let outer = std::mem::replace(&mut self.0.borrow_mut().role, Role::Backward);
        let one = self.scalar(1.0);
        let mut sums: HashMap<NodeId, Tensor> = HashMap::from([(loss.id, one)]);
        // The sum lies as the value does, whatever its users lie like.
        let add = |sums: &mut HashMap<NodeId, Tensor>, input: NodeId, grad: Tensor| {
            let sum = match sums.remove(&input) {
                Some(sum) => self.beside(input, || sum.add(&grad)),
                None => grad,
            };
            sums.insert(input, sum);
        };
        for i in (0..=loss.id.index()).rev() {
            let id = NodeId(i as u32);
            if !wanted[i] || wrt.iter().any(|t| t.id == id) && self.is_source(id) {
                continue;
            }
            products.rest(id).into_iter().for_each(|grad| add(&mut sums, id, grad));
            let Some(dy) = sums.get(&id).cloned() else { continue };
            if let Some(b) = &mut self.0.borrow_mut().backward {
                b.region = region[i];
            }
            let (inputs, grads) = self.one_gradient(id, &dy);
            for (input, grad) in inputs.into_iter().zip(grads) {
                if let Some(grad) = grad.filter(|_| wanted[input.index()]).and_then(|g| products.take(id, input, g)) {
                    add(&mut sums, input, grad);
                }
            }
        }
        for t in wrt {
            products.rest(t.id).into_iter().for_each(|grad| add(&mut sums, t.id, grad));
        }
        let out: Vec<Tensor> = wrt.iter().map(|t| sums.get(&t.id).cloned().unwrap_or_else(|| t.zeros_like())).collect();
        let mut s = self.0.borrow_mut();
        (s.backward, s.role) = (None, outer);
        for (t, grad) in wrt.iter().zip(&out) {
            if matches!(s.nodes[t.id.index()].op, Prim::Read(_)) {
                s.mark_gradient(grad.id, len);
            }
        }
        drop(s);
        out
    }

    /// Drops the rules of [`Graph::with_grad`]: they hold tensors, and those hold the graph.
    pub(crate) fn drop_rules(&self) {
        let rules = std::mem::take(&mut self.0.borrow_mut().custom);
        drop(rules);
    }

    fn is_source(&self, id: NodeId) -> bool {
        self.0.borrow().nodes[id.index()].inputs.is_empty()
    }

    fn one_gradient(&self, id: NodeId, dy: &Tensor) -> (Vec<NodeId>, Vec<Option<Tensor>>) {
        let (node, custom) = {
            let s = self.0.borrow();
            (s.nodes[id.index()].clone(), s.custom.get(&id).cloned())
        };
        self.beside(id, || match custom {
            Some((ids, rule)) => (ids, rule(dy)),
            None => {
                let inputs = node.inputs.iter().map(|&i| self.tensor(i)).collect();
                let cx = GradContext { inputs, output: self.tensor(id), dy: dy.clone() };
                let grads = node.op.op().grad(&cx);
                (node.inputs, grads)
            }
        })
    }

    /// Runs `build` in the scope and as of the place of a node.
    fn beside<T>(&self, id: NodeId, build: impl FnOnce() -> T) -> T {
        let outer = {
            let mut s = self.0.borrow_mut();
            let (scope, place) = (s.nodes[id.index()].scope.clone(), s.nodes[id.index()].place);
            (std::mem::replace(&mut s.scopes, vec![scope]), s.place.replace(place))
        };
        let result = build();
        let mut s = self.0.borrow_mut();
        (s.scopes, s.place) = outer;
        result
    }
}

impl State {
    /// What goes of each region if it is made again: all but what nodes outside take, or what that is cheaply made from,
    /// and small sums. A norm's statistics are such: they take no room, and on a mesh they would be communicated again.
    fn close_regions(&mut self) {
        let mut leaves = vec![false; self.nodes.len()];
        let region = self.region_of();
        for (i, node) in self.nodes.iter().enumerate().rev() {
            let passes = leaves[i] && self.is_cheap(NodeId(i as u32));
            for input in node.inputs.iter().map(|n| n.index()) {
                leaves[input] |= region[input] != region[i] || passes;
            }
        }
        let given = |node: &Node| matches!(node.op, Prim::Input(_) | Prim::Read(_));
        let stays = |i: usize| leaves[i] || given(&self.nodes[i]) || self.is_small_sum(&self.nodes[i]);
        let inside = |r: &Region| r.nodes.clone().filter(|i| !stays(*i)).map(|i| NodeId(i as u32)).collect();
        let inside: Vec<Vec<NodeId>> = self.regions.iter().map(inside).collect();
        self.regions.iter_mut().zip(inside).for_each(|(r, inside)| r.inside = inside);
    }

    /// Marks a variable's gradient among the nodes from `begin` on, and what it is made from element by element: the
    /// gradients of each of several uses, or of a cast.
    fn mark_gradient(&mut self, id: NodeId, begin: usize) {
        let node = &mut self.nodes[id.index()];
        if id.index() < begin || node.role == Role::Gradient {
            return;
        }
        node.role = Role::Gradient;
        let (op, size) = (node.op.op(), node.ty.elements());
        let parts = if op.elementwise() || op.copies() { node.inputs.clone() } else { vec![] };
        for part in parts {
            if self.nodes[part.index()].ty.elements() == size {
                self.mark_gradient(part, begin);
            }
        }
    }

    /// By node: the region that it is in.
    fn region_of(&self) -> Vec<Option<usize>> {
        let mut of = vec![None; self.nodes.len()];
        for (i, r) in self.regions.iter().enumerate() {
            of[r.nodes.clone()].fill(Some(i));
        }
        of
    }

    /// Whether a node sums something of at least 16 times its own size.
    fn is_small_sum(&self, node: &Node) -> bool {
        let size = |n: &NodeId| self.nodes[n.index()].ty.elements();
        matches!(node.op, Prim::Reduce(_)) && node.inputs.iter().all(|i| size(i) >= 16 * node.ty.elements())
    }

    /// The blocks that a backward pass goes through, each with what goes if it is made again.
    pub(crate) fn blocks(&self) -> Vec<Block> {
        let mut blocks: Vec<Block> = vec![];
        for r in self.regions.iter().filter(|r| !r.inside.is_empty()) {
            let Some(name) = &r.block else { continue };
            match blocks.iter_mut().find(|b| b.name == *name) {
                Some(b) => b.inside.extend(&r.inside),
                None => blocks.push(Block { name: name.clone(), inside: r.inside.clone() }),
            }
        }
        blocks
    }

    /// Whether the backward pass makes this forward value again instead of keeping it.
    fn is_remade(&self, id: NodeId) -> bool {
        self.is_cheap(id) || self.regions.iter().any(|r| r.again && r.inside.binary_search(&id).is_ok())
    }

    /// Whether a value is made again wherever it is: elementwise chains (and copies) from at most one large kept value, and
    /// products that spread. Keeping both ends of a normalisation or activation would double the memory of a network for
    /// nothing, and keeping attention's scores would take most of it.
    fn is_cheap(&self, id: NodeId) -> bool {
        const SMALL: usize = 4096;
        let node = &self.nodes[id.index()];
        if node.inputs.is_empty() {
            return matches!(node.op, Prim::Random(_) | Prim::Iota(_) | Prim::Constant(_));
        }
        if node.ty.elements() < SMALL || self.narrows_product(node) {
            return false;
        }
        if let Prim::Contract(c) = &node.op {
            let [a, b] = [0, 1].map(|i| &self.nodes[node.inputs[i].index()].ty);
            return c.spreads(a, b, &node.ty);
        }
        let op = node.op.op();
        op.copies() || op.elementwise() && self.large_roots(id, &mut HashSet::new()) <= 1
    }

    /// Whether a value is a product that spreads, or made element by element from one of its size.
    fn is_spread(&self, id: NodeId) -> bool {
        let node = &self.nodes[id.index()];
        let alike = |i: &NodeId| self.nodes[i.index()].ty.elements() == node.ty.elements() && self.is_spread(*i);
        match &node.op {
            Prim::Contract(_) => self.is_cheap(id),
            op => op.op().elementwise() && node.inputs.iter().any(alike),
        }
    }

    /// How many kept values of about this value's size its elementwise chain starts from, as far as two.
    fn large_roots(&self, id: NodeId, seen: &mut HashSet<NodeId>) -> usize {
        let node = &self.nodes[id.index()];
        let large = node.ty.elements() / 2;
        let mut roots = 0;
        for &i in &node.inputs {
            let input = &self.nodes[i.index()];
            if input.ty.elements() <= large || input.inputs.is_empty() && self.is_cheap(i) || !seen.insert(i) {
                continue;
            }
            let goes_on = input.op.op().elementwise() && !input.inputs.is_empty() && !self.narrows_product(input);
            roots += if goes_on { self.large_roots(i, seen) } else { 1 };
            // More than one is too many, however many they are.
            if roots > 1 {
                break;
            }
        }
        roots
    }

    /// Whether a node is a product in fewer bits, as it is or with something small, such as a bias, added: that is kept
    /// instead of the product.
    fn narrows_product(&self, node: &Node) -> bool {
        if !matches!(node.op, Prim::Cast(_)) || !node.ty.dtype.is_half() {
            return false;
        }
        let operand = |of: &Node| {
            let mut large = of.inputs.iter().filter(|i| self.nodes[i.index()].ty.elements() == node.ty.elements());
            large.next().filter(|i| large.next().is_none() && self.nodes[i.index()].ty.dtype == DType::F32).copied()
        };
        let mut at = operand(node);
        while let Some(id) = at {
            let input = &self.nodes[id.index()];
            if input.op.is_product() {
                return !self.is_cheap(id);
            }
            at = if input.op.op().elementwise() { operand(input) } else { None };
        }
        false
    }
}

impl Tensor {
    /// The graph it belongs to.
    pub fn graph(&self) -> &Graph {
        &self.graph
    }
    /// Its node.
    pub fn id(&self) -> NodeId {
        self.id
    }
    /// Its type.
    pub fn ty(&self) -> Type {
        self.graph.0.borrow().nodes[self.id.index()].ty.clone()
    }
    /// What it is a cast of, if it is one and no gradient of its own was given to it.
    pub(crate) fn cast_from(&self) -> Option<Tensor> {
        let s = self.graph.0.borrow();
        let node = &s.nodes[self.id.index()];
        let is_cast = matches!(node.op, Prim::Cast(_)) && !s.custom.contains_key(&self.id);
        is_cast.then(|| self.graph.tensor(node.inputs[0]))
    }
    /// Its dimension of that name; a missing one is noted as a mistake and has size 1.
    #[track_caller]
    pub fn dim(&self, name: &str) -> Dim {
        let ty = self.ty();
        match ty.dims.iter().find(|d| d.name == *name) {
            Some(d) => d.clone(),
            None => {
                let what = format!("{ty} has no dimension `{name}`");
                let help = match crate::error::nearest(name, ty.dims.iter().map(|d| &*d.name)) {
                    Some(n) => format!("did you mean `{n}`?"),
                    None => String::new(),
                };
                self.graph.fail(Error::new(Cause::Feed { what, help }).at(self.graph.place()));
                crate::dim::dim(name, 1)
            }
        }
    }
    /// Applies an op to this value alone.
    #[track_caller]
    pub fn apply(&self, op: impl Into<Prim>) -> Tensor {
        self.graph.apply(op, &[self])
    }
    /// Rules for the layout of this tensor alone, in place of the layout's: `"x:x, channel:model"`; `""` replicates it.
    pub fn with_layout(self, rules: &str) -> Tensor {
        self.graph.0.borrow_mut().nodes[self.id.index()].layout = Some(rules.into());
        self
    }
    /// The same value, through which no gradient flows.
    pub fn stop_gradient(&self) -> Tensor {
        let out = self.apply(ops::unary::Unary { f: ops::unary::UnaryFn::Identity });
        self.graph.with_grad(&[], &out, |_| vec![]);
        out
    }
    /// Zeros of this type.
    #[track_caller]
    pub fn zeros_like(&self) -> Tensor {
        let ty = self.ty();
        self.graph.apply(ops::source::Constant { value: 0.0, dtype: ty.dtype }, &[]).broadcast(&ty.dims)
    }
}
