//! A program: a set of named functions over one set of named variables.

use crate::chunk;
use crate::dim::{Name, Type};
use crate::error::{Cause, Error, Place};
use crate::graph::{Graph, Node, NodeId, Role};
use crate::ops::Prim;
use crate::ops::source::Distribution;
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

/// Index of a variable in its program.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, serde::Serialize, serde::Deserialize)]
pub struct VarId(pub u32);

impl VarId {
    /// As an index.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// How a variable starts: `scale * draw + offset`, drawn by the counter-based generator under the variable's name.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub enum Init {
    /// One value everywhere.
    Constant(f32),
    /// Draws times `scale`.
    Random {
        /// What is drawn.
        distribution: Distribution,
        /// Factor.
        scale: f32,
        /// Summand.
        offset: f32,
    },
}

impl Init {
    /// Zeros.
    pub fn zeros() -> Init {
        Init::Constant(0.0)
    }
    /// Ones.
    pub fn ones() -> Init {
        Init::Constant(1.0)
    }
}

/// A variable: a tensor that lives from step to step.
#[derive(Clone, Debug)]
pub struct Variable {
    /// Path: `encoder.0/conv.0/filter`.
    pub name: Name,
    /// Type.
    pub ty: Type,
    /// How it starts.
    pub init: Init,
    /// Whether optimizers train it.
    pub trainable: bool,
    /// What it is for: a variable of the model, an optimizer's slot, or where a gradient is added up.
    pub role: Role,
    /// Where it is declared.
    pub place: Place,
}

impl Variable {
    /// The scope in which the nodes of its role are: its own path, that of the variable whose slot it is, or for a
    /// gradient that of the module.
    fn belongs_to(&self) -> &str {
        let levels = match self.role {
            Role::Forward | Role::Backward | Role::Variable => 0,
            Role::Update => 1,
            Role::Gradient => 2,
        };
        (0..levels).fold(&*self.name, |path, _| path.rsplit_once('/').map_or("", |(parent, _)| parent))
    }
}

/// The variables of a program under construction, and what else its functions share.
#[derive(Default, Debug)]
pub struct Variables {
    /// In order of declaration.
    pub list: Vec<Variable>,
    /// The program's chunks.
    pub chunking: Chunking,
    /// Blocks that backward passes make again.
    pub recompute: BTreeSet<Name>,
}

impl Variables {
    /// The variable of that name, declared if it is not yet.
    pub(crate) fn declare(&mut self, new: Variable) -> Result<VarId, Error> {
        if let Some(i) = self.list.iter().position(|v| v.name == new.name) {
            let first = &self.list[i];
            if first.ty != new.ty {
                let (first_ty, second) = (first.ty.to_string(), new.ty.to_string());
                let cause = Cause::VariableType { name: new.name, first: first_ty, second };
                return Err(Error::new(cause).at(new.place).note(format!("declared first at {}", first.place)));
            }
            return Ok(VarId(i as u32));
        }
        self.list.push(new);
        Ok(VarId(self.list.len() as u32 - 1))
    }
}

/// How dimensions are cut into chunks; a property of the program, never of a layout.
#[derive(Clone, Debug, PartialEq)]
pub struct Chunking {
    /// The most chunks a dimension has.
    pub chunks: usize,
    /// The dimension that most feeds begin with, as a rule that of examples: sums over it and others halve it first.
    pub first: Option<Name>,
    grain: BTreeMap<Name, usize>,
}

impl Default for Chunking {
    fn default() -> Self {
        Chunking { chunks: 8, first: None, grain: BTreeMap::new() }
    }
}

impl Chunking {
    /// Number of chunks of a dimension.
    pub fn count(&self, name: &Name, size: usize) -> usize {
        chunk::chunk_count(size, self.grain.get(name).copied().unwrap_or(1), self.chunks)
    }
    /// Makes chunks of the dimension hold at least `grain` elements.
    pub fn raise_grain(&mut self, name: Name, grain: usize) {
        let g = self.grain.entry(name).or_insert(1);
        *g = grain.max(*g);
    }
    /// The dimensions whose chunks hold more than one element at least, with that number.
    pub fn grains(&self) -> impl Iterator<Item = (&Name, usize)> {
        self.grain.iter().map(|(n, g)| (n, *g))
    }
    /// The summation tree over some dimensions.
    pub fn tree(&self, dims: &[crate::dim::Dim]) -> chunk::Tree {
        let first = dims.iter().position(|d| Some(&d.name) == self.first.as_ref());
        let dims = dims.iter().map(|d| chunk::TreeDim { size: d.size, chunks: self.count(&d.name, d.size) });
        chunk::Tree { dims: dims.collect(), first }
    }
}

/// A part of a function's forward pass that its backward pass may make again: [`Graph::block`].
#[derive(Clone, Debug, PartialEq)]
pub struct Block {
    /// Its name.
    pub name: Name,
    /// Values of the forward pass that need not be kept for the backward pass where it does.
    pub inside: Vec<NodeId>,
}

/// One function of a program.
#[derive(Clone, Debug)]
pub struct Function {
    /// Its name.
    pub name: Name,
    /// Nodes that its results depend on, inputs before users.
    pub nodes: Vec<Node>,
    /// Feeds.
    pub inputs: Vec<(Name, NodeId)>,
    /// Fetches.
    pub outputs: Vec<(Name, NodeId)>,
    /// Variables it sets; the node is an `assign`.
    pub assigns: Vec<(VarId, NodeId)>,
    /// Blocks of its forward pass, made again or not; none where it has no backward pass, or was sent from elsewhere.
    pub blocks: Vec<Block>,
}

impl Function {
    /// The node of that id.
    pub fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id.index()]
    }
    /// The types of a node's inputs.
    pub fn input_types(&self, node: &Node) -> Vec<&Type> {
        node.inputs.iter().map(|&i| &self.node(i).ty).collect()
    }
    /// Floating-point operations of one run, counted on the whole tensors.
    pub fn flops(&self) -> u64 {
        self.nodes.iter().map(|n| n.op.op().flops(&self.input_types(n), &n.ty)).sum()
    }
    fn check(&mut self, variables: &[Variable]) -> Result<(), String> {
        for i in 0..self.nodes.len() {
            let node = &self.nodes[i];
            let wrong = |what: &str| Err(format!("node {i}, {}, {what}", node.op.op().name()));
            if !node.op.op().takes(node.inputs.len()) || node.inputs.iter().any(|n| n.index() >= i) {
                return wrong("has inputs that it cannot have");
            }
            let types: Vec<&Type> = node.inputs.iter().map(|n| &self.nodes[n.index()].ty).collect();
            let variable = |v: VarId| variables.get(v.index()).map(|v| &v.ty);
            match &node.op {
                Prim::Read(r) if variable(r.var) != Some(&r.ty) => return wrong("reads a variable of another type"),
                Prim::Assign(a) if variable(a.var) != Some(types[0]) => {
                    return wrong("sets a variable of another type");
                }
                _ => {}
            }
            let ty = node.op.op().infer(&types).map_err(|r| format!("node {i}, {}", r.message))?;
            ty.check().map_err(|e| format!("node {i}: {e}"))?;
            self.nodes[i].ty = ty;
        }
        let op = |n: &NodeId| self.nodes.get(n.index()).map(|n| &n.op);
        let fed = |(name, n): &(Name, NodeId)| matches!(op(n), Some(Prim::Input(i)) if i.name == *name);
        let set = |(v, n): &(VarId, NodeId)| matches!(op(n), Some(Prim::Assign(a)) if a.var == *v);
        let edges = self.inputs.iter().all(fed)
            && self.outputs.iter().all(|(_, n)| op(n).is_some())
            && self.assigns.iter().all(set);
        let unique = |list: &[(Name, NodeId)]| list.iter().map(|(n, _)| n).collect::<BTreeSet<_>>().len() == list.len();
        let once = self.assigns.iter().map(|(v, _)| v).collect::<BTreeSet<_>>().len() == self.assigns.len();
        if !edges || !unique(&self.inputs) || !unique(&self.outputs) || !once {
            return Err("its feeds, fetches or assignments are not nodes of their kind, each once".into());
        }
        Ok(())
    }
    /// The part of it that sets those variables, and gives no results.
    fn setting(&self, variables: &BTreeSet<VarId>) -> Function {
        let assigns = self.assigns.iter().filter(|(v, _)| variables.contains(v)).copied().collect();
        pruned(self.name.clone(), &self.nodes, [vec![], vec![]], assigns, vec![])
    }
    /// The variables that it reads or sets, in order of declaration.
    pub fn variables(&self) -> Vec<VarId> {
        let touched = self.nodes.iter().filter_map(|n| match &n.op {
            Prim::Read(r) => Some(r.var),
            Prim::Assign(a) => Some(a.var),
            _ => None,
        });
        touched.collect::<BTreeSet<_>>().into_iter().collect()
    }
    /// Those of its convolutions and contractions.
    pub fn product_flops(&self) -> u64 {
        let products = self.nodes.iter().filter(|n| n.op.is_product());
        products.map(|n| n.op.op().flops(&self.input_types(n), &n.ty)).sum()
    }
}

/// A finished program.
#[derive(Clone, Debug)]
pub struct Program {
    /// Variables in order of declaration.
    pub variables: Vec<Variable>,
    /// Functions by name; `init` sets every variable to its start.
    pub functions: BTreeMap<Name, Function>,
    /// How dimensions are cut into chunks.
    pub chunking: Chunking,
    /// Its stages in order, each with its functions; none: all functions are one.
    pub stages: Vec<(Name, Vec<Name>)>,
}

impl Program {
    /// What a stage runs, as a program of its own: its functions, the variables that they read or set, and an `init` of
    /// just those.
    ///
    /// # Errors
    /// No stage of that name.
    pub fn stage(&self, name: &str) -> Result<Program, Error> {
        let Some((_, functions)) = self.stages.iter().find(|(n, _)| **n == *name) else {
            let known: Vec<&str> = self.stages.iter().map(|(n, _)| &**n).collect();
            let what = format!("the program has no stage `{name}`");
            return Err(Error::new(Cause::Feed { what, help: format!("it has {}", known.join(", ")) }));
        };
        self.only(functions)
    }

    /// Some of its functions, as [`Program::stage`].
    ///
    /// # Errors
    /// A function that there is not.
    pub fn only(&self, names: &[Name]) -> Result<Program, Error> {
        let mut functions = BTreeMap::new();
        for name in names {
            functions.insert(name.clone(), self.function(name)?.clone());
        }
        let touched: BTreeSet<VarId> = functions.values().flat_map(Function::variables).collect();
        if let Some(init) = self.functions.get(&Name::from("init")) {
            functions.insert("init".into(), init.setting(&touched));
        }
        let new: BTreeMap<VarId, VarId> = touched.iter().zip(0..).map(|(old, new)| (*old, VarId(new))).collect();
        for f in functions.values_mut() {
            for node in &mut f.nodes {
                match &mut node.op {
                    Prim::Read(r) => r.var = new[&r.var],
                    Prim::Assign(a) => a.var = new[&a.var],
                    _ => {}
                }
            }
            f.assigns.iter_mut().for_each(|(v, _)| *v = new[v]);
        }
        Ok(Program {
            variables: touched.iter().map(|v| self.variables[v.index()].clone()).collect(),
            functions,
            chunking: self.chunking.clone(),
            stages: vec![],
        })
    }

    /// The program with dimensions in so many chunks at the most: other sums, and shards.
    pub fn in_chunks(mut self, most: usize) -> Program {
        self.chunking.chunks = most;
        self
    }

    /// The function of that name.
    pub fn function(&self, name: &str) -> Result<&Function, Error> {
        self.functions.get(&Name::from(name)).ok_or_else(|| {
            let known: Vec<&str> = self.functions.keys().map(|n| &**n).collect();
            Error::new(Cause::Feed {
                what: format!("the program has no function `{name}`"),
                help: match crate::error::nearest(name, known.iter().copied()) {
                    Some(near) => format!("did you mean `{near}`?"),
                    None => format!("it has {}", known.join(", ")),
                },
            })
        })
    }
    /// The variable of that name.
    pub fn variable(&self, name: &str) -> Option<VarId> {
        self.variables.iter().position(|v| v.name == *name).map(|i| VarId(i as u32))
    }
    /// A program that comes from outside, every rule checked that the builder keeps, and the types of its nodes worked
    /// out anew.
    ///
    /// # Errors
    /// The first rule that is broken.
    pub fn checked(mut self) -> Result<Program, Error> {
        let invalid = |what: String| Error::from(Cause::Invalid { what });
        if !(1..=4096).contains(&self.chunking.chunks) {
            return Err(invalid(format!("{} chunks a dimension", self.chunking.chunks)));
        }
        let mut names = BTreeSet::new();
        for v in &self.variables {
            v.ty.check().map_err(|e| invalid(format!("variable `{}`: {e}", v.name)))?;
            if !names.insert(&v.name) {
                return Err(invalid(format!("two variables `{}`", v.name)));
            }
        }
        for f in self.functions.values_mut() {
            f.check(&self.variables).map_err(|what| invalid(format!("function `{}`: {what}", f.name)))?;
        }
        Ok(self)
    }
    /// The blocks that may be recomputed, in the order of the program.
    pub fn blocks(&self) -> Vec<Name> {
        let mut names: Vec<Name> = vec![];
        // Of several functions, the one with most of them has their order.
        let mut functions: Vec<&Function> = self.functions.values().collect();
        functions.sort_by_key(|f| std::cmp::Reverse(f.blocks.len()));
        for b in functions.iter().flat_map(|f| &f.blocks) {
            if !names.contains(&b.name) {
                names.push(b.name.clone());
            }
        }
        names
    }
    /// Number of trained parameters.
    pub fn parameters(&self) -> usize {
        self.variables.iter().filter(|v| v.trainable).map(|v| v.ty.elements()).sum()
    }
}

/// Builds a program function by function.
#[derive(Default)]
pub struct ProgramBuilder {
    variables: Rc<RefCell<Variables>>,
    functions: BTreeMap<Name, Function>,
    stages: Vec<(Name, Vec<Name>)>,
}

impl ProgramBuilder {
    /// An empty program.
    pub fn new() -> Self {
        Self::default()
    }

    /// An empty program whose backward passes make these blocks again ([`Graph::block`]). That costs time, saves memory
    /// and changes no bit.
    pub fn recomputing(blocks: &[Name]) -> Self {
        let p = Self::default();
        p.variables.borrow_mut().recompute.extend(blocks.iter().cloned());
        p
    }

    /// Adds a function. `build` makes its graph and names its outputs; what it returns is handed back.
    ///
    /// # Errors
    /// The first mistake `build` made, with its place; or a second function of that name.
    #[track_caller]
    pub fn function<T>(&mut self, name: impl Into<Name>, build: impl FnOnce(&Graph) -> T) -> Result<T, Error> {
        let name = name.into();
        let place = Place::here();
        if self.functions.contains_key(&name) {
            return Err(Error::new(Cause::TwiceNamed { what: "functions", name }).at(place));
        }
        let graph = Graph::new(self.variables.clone());
        let out = build(&graph);
        let function = finish(name.clone(), &graph);
        graph.drop_rules();
        let function = function?;
        self.functions.insert(name, function);
        Ok(out)
    }

    /// Adds a stage: a session in it has its functions, and no variables but those that they use. A session begins in the
    /// first stage.
    ///
    /// # Errors
    /// A function that there is not; a second stage of that name.
    #[track_caller]
    pub fn stage(&mut self, name: impl Into<Name>, functions: &[&str]) -> Result<(), Error> {
        let (name, place) = (name.into(), Place::here());
        if let Some(missing) = functions.iter().find(|f| !self.functions.contains_key(&Name::from(**f))) {
            let what = format!("stage `{name}` has no function `{missing}` to run");
            return Err(Error::new(Cause::Feed { what, help: "add the function first".into() }).at(place));
        }
        if self.stages.iter().any(|(n, _)| *n == name) {
            return Err(Error::new(Cause::TwiceNamed { what: "stages", name }).at(place));
        }
        self.stages.push((name, functions.iter().map(|f| Name::from(*f)).collect()));
        Ok(())
    }

    /// Adds a function that copies variables: each variable of path p that function `of` reads or sets, and for which
    /// `from(p)` names another one, becomes equal to that one. Layers that shared variables get copies of their own so,
    /// optimizer slots too, for their paths begin with the variable's.
    ///
    /// # Errors
    /// No function `of`; a source that there is not, or of another type.
    #[track_caller]
    pub fn copies(
        &mut self,
        name: impl Into<Name>,
        of: &str,
        from: impl Fn(&str) -> Option<String>,
    ) -> Result<(), Error> {
        let missing = |what: String, help: &str| Error::new(Cause::Feed { what, help: help.into() }).at(Place::here());
        let Some(function) = self.functions.get(&Name::from(of)) else {
            return Err(missing(format!("there is no function `{of}` to copy variables for"), "add it first"));
        };
        let mut pairs = Vec::new();
        {
            let list = &self.variables.borrow().list;
            let find = |path: &str| list.iter().position(|v| *v.name == *path).map(|i| VarId(i as u32));
            for to in function.variables() {
                let path = &list[to.index()].name;
                let Some(source) = from(path).filter(|source| **source != **path) else { continue };
                let Some(from) = find(&source) else {
                    let what = format!("there is no variable `{source}` to copy to `{path}`");
                    return Err(missing(what, "add the functions that use it first"));
                };
                pairs.push((to, from));
            }
        }
        self.function(name, |g| pairs.iter().for_each(|(to, from)| g.assign(&g.read(*to), &g.read(*from))))
    }

    /// The finished program, with the function `init` added.
    pub fn finish(mut self) -> Result<Program, Error> {
        let list = self.variables.borrow().list.clone();
        self.function("init", |g| {
            for (i, v) in list.iter().enumerate() {
                let start = || match &v.init {
                    Init::Constant(c) => g.scalar(*c).broadcast(&v.ty.dims),
                    Init::Random { distribution, scale, offset } => {
                        let draw = g.random_keyed(*distribution, &v.ty.dims, crate::rng::key_of(&v.name));
                        draw.mul_scalar(*scale).add_scalar(*offset)
                    }
                };
                // Each device draws the part that it will hold.
                let set = || g.assign(&g.read(VarId(i as u32)), &start());
                g.with_role(v.role, || g.scoped_at(v.belongs_to(), set));
            }
        })?;
        let variables = self.variables.borrow();
        Ok(Program {
            variables: variables.list.clone(),
            chunking: Chunking { first: first_of_feeds(&self.functions), ..variables.chunking.clone() },
            functions: self.functions,
            stages: self.stages,
        })
    }
}

/// The dimension that most feeds begin with; of equals the first one.
fn first_of_feeds(functions: &BTreeMap<Name, Function>) -> Option<Name> {
    let mut votes: Vec<(Name, usize)> = vec![];
    let feeds = functions.values().flat_map(|f| f.inputs.iter().map(|(_, n)| &f.node(*n).ty));
    for dim in feeds.filter_map(|ty| ty.dims.first()) {
        match votes.iter_mut().find(|(name, _)| *name == dim.name) {
            Some((_, n)) => *n += 1,
            None => votes.push((dim.name.clone(), 1)),
        }
    }
    votes.into_iter().rev().max_by_key(|(_, n)| *n).map(|(name, _)| name)
}

/// Takes what the results depend on out of the graph.
fn finish(name: Name, graph: &Graph) -> Result<Function, Error> {
    let s = graph.0.borrow();
    if let Some(e) = &s.error {
        return Err(e.clone());
    }
    Ok(pruned(name, &s.nodes, [s.inputs.clone(), s.outputs.clone()], s.assigns.clone(), s.blocks()))
}

/// A function of those nodes that its feeds, results and assignments need.
fn pruned(
    name: Name,
    all: &[Node],
    [inputs, outputs]: [Vec<(Name, NodeId)>; 2],
    assigns: Vec<(VarId, NodeId)>,
    mut blocks: Vec<Block>,
) -> Function {
    let mut live = vec![false; all.len()];
    let kept = inputs.iter().chain(&outputs).map(|(_, n)| n).chain(assigns.iter().map(|(_, n)| n));
    kept.for_each(|n| live[n.index()] = true);
    for i in (0..all.len()).rev() {
        if live[i] {
            all[i].inputs.iter().for_each(|n| live[n.index()] = true);
        }
    }
    let mut new = vec![NodeId(0); all.len()];
    let mut nodes = Vec::new();
    for (i, node) in all.iter().enumerate().filter(|(i, _)| live[*i]) {
        new[i] = NodeId(nodes.len() as u32);
        nodes.push(Node { inputs: node.inputs.iter().map(|n| new[n.index()]).collect(), ..node.clone() });
    }
    for b in &mut blocks {
        b.inside.retain(|n| live[n.index()]);
        b.inside.iter_mut().for_each(|n| *n = new[n.index()]);
    }
    let renumber = |list: Vec<(Name, NodeId)>| list.into_iter().map(|(n, id)| (n, new[id.index()])).collect();
    Function {
        name,
        nodes,
        inputs: renumber(inputs),
        outputs: renumber(outputs),
        assigns: assigns.into_iter().map(|(v, id)| (v, new[id.index()])).collect(),
        blocks,
    }
}
