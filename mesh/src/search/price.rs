//! What nodes and steps take on a mesh, of the device that stands for all: what [`crate::spmd`] lowers a node to, in closed
//! form, and what [`crate::plan::time`] says of it.

use super::outline::{Form, Kind, Outline, Source, Work};
use super::regions::{Regions, Wanted};
use super::split::{Axes, Pipeline, Sees, Shape, Site, Splits, Way};
use crate::chunk::Tree;
use crate::dim::{DType, Dim, Name};
use crate::hash::Quick;
use crate::layout::Mesh;
use crate::machine::Machine;
use crate::ops::Prim;
use crate::plan::cost::Cost;
use crate::plan::exchange::SEGMENTED;
use crate::plan::pieces::rows_are_whole;
use crate::region::Region;
use std::cell::{OnceCell, RefCell};
use std::collections::HashMap;
use std::ops::Range;
use std::rc::Rc;

/// How a value lies.
#[derive(Clone)]
pub struct Held {
    /// How it is split where rules for its uses hold.
    used: Splits,
    /// How it lies.
    pub split: Splits,
    /// What of it the device has.
    pub region: Rc<Region>,
}

/// What a node takes.
pub struct Taken {
    /// What it needs, by number.
    pub needs: usize,
    /// Whether that has to be moved, if it lies as this segment's rules say.
    pub moved: bool,
    /// Bytes that are in memory for it.
    reads: f64,
}

/// A node on a mesh.
pub struct Priced {
    /// Its result.
    pub held: Held,
    /// What it takes, which hardly any node is asked for.
    inputs: OnceCell<Vec<Taken>>,
    /// How it is split.
    along: Along,
    /// Seconds that finishing its sum takes.
    pub sum: f64,
    /// What it iterates over, and of its result computes.
    at: Rc<Region>,
    computed: Rc<Region>,
    /// Nodes of the summation tree that the device computes, of how many chunks.
    nodes: usize,
    leaves: usize,
}

/// Prices on a mesh.
pub struct Prices<'a> {
    /// The mesh.
    pub site: Site<'a>,
    /// Whether devices wait in every collective.
    waiting: bool,
    outline: &'a Outline<'a>,
    regions: Regions,
    /// By source.
    held: HashMap<(usize, Way), Held, Quick>,
    nodes: Vec<HashMap<Way, Rc<Priced>, Quick>>,
    works: Vec<HashMap<Way, f64, Quick>>,
    /// By kind of node, how that lies, and what is needed.
    moves: HashMap<(usize, Splits, usize), f64, Quick>,
    peers: RefCell<HashMap<Axes, [usize; 2], Quick>>,
    /// By tree and how its dimensions are split: how many nodes of it are the device's.
    trees: RefCell<HashMap<(Tree, Splits), usize, Quick>>,
}

/// How a node is split: its result where it lies, or what it sums over and what is around that.
enum Along {
    Lying,
    Sum(Sum),
}

/// The split of a summed-over dimension, and of which axes it may be.
struct Sum {
    reduced: Splits,
    around: Splits,
}

impl<'a> Prices<'a> {
    /// Prices on that mesh, of devices that wait in every collective or not: then nothing waits for the latency of what
    /// gradients, updates and variables send, since many of those are under way at once.
    pub fn new(outline: &'a Outline<'a>, site: Site<'a>, waiting: bool) -> Prices<'a> {
        let nodes = vec![HashMap::default(); outline.kinds.len()];
        let works = vec![HashMap::default(); outline.works.len()];
        Prices {
            site,
            waiting,
            outline,
            regions: Regions::default(),
            held: HashMap::default(),
            nodes,
            works,
            moves: HashMap::default(),
            peers: RefCell::default(),
            trees: RefCell::default(),
        }
    }

    /// What of a way nodes of that kind depend on.
    pub fn node_sees(&self, kind: usize) -> Sees {
        self.outline.kinds[kind].sees
    }

    /// What of a way steps of that kind depend on.
    pub fn step_sees(&self, work: usize) -> Sees {
        self.outline.works[work].sees
    }

    /// A node of that kind.
    pub fn node(&mut self, kind: usize, way: Way) -> Rc<Priced> {
        let outline = self.outline;
        let (k, way) = (&outline.kinds[kind], self.node_sees(kind).of(way));
        if let Some(priced) = self.nodes[kind].get(&way) {
            return priced.clone();
        }
        let priced = Rc::new(self.priced(k, way));
        self.nodes[kind].insert(way, priced.clone());
        priced
    }

    /// Elements of what is needed.
    pub fn elements(&self, wanted: usize) -> usize {
        self.regions.wanted(wanted).region.elements()
    }

    /// Bytes of an element of what a node of that kind gives.
    pub fn element(&self, kind: usize) -> usize {
        self.outline.kinds[kind].own.shape.element
    }

    /// Seconds of a step of that kind.
    pub fn step(&mut self, work: usize, way: Way) -> f64 {
        let outline = self.outline;
        let (w, way) = (&outline.works[work], self.step_sees(work).of(way));
        if let Some(seconds) = self.works[work].get(&way) {
            return *seconds;
        }
        let seconds = self.work(w, way);
        self.works[work].insert(way, seconds);
        seconds
    }

    /// Whether what is needed beyond what the device has lies apart from that, by number.
    pub fn is_apart(&self, wanted: usize) -> bool {
        self.regions.wanted(wanted).apart
    }

    /// Seconds until the device has `wanted` of what a node of that kind gives, which lies so.
    pub fn moved(&mut self, kind: usize, held: &Held, wanted: usize) -> f64 {
        let key = (kind, held.split, wanted);
        if let Some(seconds) = self.moves.get(&key) {
            return *seconds;
        }
        let seconds = self.move_of(kind, held, self.regions.wanted(wanted));
        self.moves.insert(key, seconds);
        seconds
    }

    fn move_of(&self, kind: usize, held: &Held, wanted: &Wanted) -> f64 {
        let kind = &self.outline.kinds[kind];
        let (shape, beside) = (&kind.own.shape, self.beside(kind));
        let (crosses, apart, wanted) = (wanted.crosses(held.split), wanted.apart, &wanted.region);
        let bytes = 2.0 * (wanted.elements() * shape.element) as f64;
        if crosses {
            // The device that stands for all may have what it needs, being as far along one axis as along another. Of others,
            // all comes from those that hold other parts.
            let peers = self.peers(held.split.axes()).map(|n| n as f64);
            let received = peers.map(|n| 0.5 * bytes * n / (peers[0] + peers[1]));
            let messages = received.map(|b| usize::from(b > 0.0));
            return self.collective("all-to-all", Cost { flops: 0.0, bytes }, messages, received, beside);
        }
        if held.region.contains(wanted) {
            return 0.0;
        }
        let received = self.site.received(shape, held.split, wanted);
        let messages = received.map(|b| usize::from(b > 0.0));
        let class = exchange(held, wanted);
        // A halo that is read where it comes has nothing copied beside it.
        let bytes = if apart { 2.0 * (received[0] + received[1]) } else { bytes };
        self.collective(class, Cost { flops: 0.0, bytes }, messages, received, beside)
    }

    /// How many others differ from the device along those axes only: on its host, and on others.
    fn peers(&self, axes: Axes) -> [usize; 2] {
        *self.peers.borrow_mut().entry(axes).or_insert_with(|| self.site.peers(axes))
    }

    /// Whether what is sent of a node's result is on its way beside other steps.
    fn beside(&self, k: &Kind) -> bool {
        !self.waiting && (!k.passes || k.own.stored.is_some())
    }

    /// Seconds of a step that communicates; `beside` others, without the latency of its messages.
    fn collective(&self, class: &str, cost: Cost, messages: [usize; 2], bytes: [f64; 2], beside: bool) -> f64 {
        let messages = if beside { [0; 2] } else { messages };
        let links = self.site.links(messages, bytes) * self.site.pipeline.seconds();
        self.seconds(class, "collective", cost, DType::F32) + links
    }

    fn seconds(&self, class: &str, family: &str, cost: Cost, dtype: DType) -> f64 {
        let shared = Cost { flops: cost.flops * self.site.share, bytes: cost.bytes * self.site.share };
        self.site.machine.rate(class, family).seconds(shared, dtype) * self.site.pipeline.seconds()
    }

    /// How something lies.
    fn held(&mut self, source: &Source, way: Way) -> Held {
        let way = source.sees.of(way);
        if let Some(held) = self.held.get(&(source.number, way)) {
            return held.clone();
        }
        let held = self.lies(source, way);
        self.held.insert((source.number, way), held.clone());
        held
    }

    fn lies(&mut self, source: &Source, way: Way) -> Held {
        let used = self.site.split(&source.shape, way);
        let mut region = self.regions.one(self.site.region(&source.shape, used));
        let mut split = used;
        if let Some(stored) = &source.stored {
            let lies = self.site.split(stored, way);
            let there = self.regions.one(self.site.region(stored, lies));
            // A cast is made where its variable lies, if that is less.
            if !source.cast || region.contains(&there) {
                (split, region) = (lies, there);
            }
        }
        Held { used, split, region }
    }

    fn priced(&mut self, k: &Kind, way: Way) -> Priced {
        let held = self.held(&k.own, way);
        let is_made_there = match &k.op {
            Prim::Input(_) | Prim::Read(_) | Prim::Assign(_) => true,
            Prim::Cast(_) => held.split != held.used && self.held(&k.inputs[0], way).region == held.region,
            _ => false,
        };
        if is_made_there {
            return Priced {
                inputs: OnceCell::new(),
                along: Along::Lying,
                sum: 0.0,
                at: held.region.clone(),
                computed: held.region.clone(),
                nodes: 1,
                leaves: 1,
                held,
            };
        }
        let sum = match k.reduced.is_empty() {
            true => Sum { reduced: Splits::default(), around: held.used },
            false => self.sum(k, &held, way),
        };
        let done = match k.own.stored {
            None => held.region.clone(),
            Some(_) => self.regions.one(self.site.region(&k.own.shape, held.used)),
        };
        let computed = if sum.around == held.used {
            done.clone()
        } else {
            self.regions.one(self.site.region(&k.own.shape, sum.around))
        };
        let leaves = self.parts(k, sum.reduced).map(|(_, chunks)| chunks.len()).product();
        let at =
            if k.reduced.is_empty() { computed.clone() } else { self.regions.one(self.points(k, &sum, &computed)) };
        let axes = sum.reduced.axes();
        let nodes = if axes == 0 { 1 } else { self.tree_nodes(k, sum.reduced) };
        let seconds = match axes {
            0 => 0.0,
            _ => self.finish(axes, nodes, &computed, &done, k),
        };
        Priced { held, inputs: OnceCell::new(), along: Along::Sum(sum), sum: seconds, at, computed, nodes, leaves }
    }

    /// What a node of that kind takes.
    pub fn inputs<'p>(&mut self, kind: usize, priced: &'p Priced, way: Way) -> &'p [Taken] {
        let outline = self.outline;
        priced.inputs.get_or_init(|| self.taken(&outline.kinds[kind], priced, way))
    }

    fn taken(&mut self, k: &Kind, priced: &Priced, way: Way) -> Vec<Taken> {
        let types: Vec<_> = k.types.iter().collect();
        let take = |(i, source): (usize, &Source)| {
            let held = self.held(source, way);
            let mut wanted = match &priced.along {
                Along::Lying => Wanted { region: priced.held.region.clone(), split: priced.held.split, apart: false },
                Along::Sum(sum) => {
                    let region = self.regions.one(k.op.op().needs(i, &types, &k.ty, &priced.at));
                    let dims = held.region.0.iter().zip(&region.0);
                    let grows = dims.filter(|((_, held), (_, needed))| held != needed).map(|((name, _), _)| name);
                    let apart = i == 0 && exchange(&held, &region) == "halo" && rows_are_whole(types[0], &k.op, grows);
                    Wanted { split: split_of(k, i, sum, &region), region, apart }
                }
            };
            wanted.apart &= !wanted.crosses(held.split);
            let lies = match priced.along {
                Along::Lying => held.region == wanted.region,
                Along::Sum(_) => held.region.contains(&wanted.region),
            };
            let moved = !lies || wanted.crosses(held.split);
            let there = if moved && matches!(priced.along, Along::Sum(_)) { &wanted.region } else { &held.region };
            let reads = (there.elements() * source.shape.element) as f64;
            Taken { needs: self.regions.number(wanted), moved, reads }
        };
        k.inputs.iter().enumerate().map(take).collect()
    }

    /// What the device sums over, dimension by dimension: its elements and its chunks.
    fn parts(&self, k: &Kind, reduced: Splits) -> impl Iterator<Item = (Range<usize>, Range<usize>)> {
        k.reduced.iter().enumerate().map(move |(i, d)| {
            let (count, axes) = (self.outline.program.chunking.count(&d.name, d.size), reduced.of(i));
            (self.site.owned(d.size, count, axes), self.site.owned_chunks(count, axes))
        })
    }

    /// What a node that computes that of its result iterates over.
    fn points(&self, k: &Kind, sum: &Sum, computed: &Region) -> Region {
        let parts = k.reduced.iter().zip(self.parts(k, sum.reduced));
        parts.fold(computed.clone(), |at, (d, (elements, _))| at.with(&d.name, elements))
    }

    /// How many nodes of its summation tree the device has, where that is split so.
    fn tree_nodes(&self, k: &Kind, reduced: Splits) -> usize {
        let key = (self.outline.program.chunking.tree(&k.reduced), reduced);
        let chunks = || self.parts(k, reduced).map(|(_, chunks)| chunks).collect::<Vec<_>>();
        *self.trees.borrow_mut().entry(key).or_insert_with_key(|(tree, _)| tree.count(&chunks()))
    }

    /// How a node's sum is split: as its inputs are, or with inputs gathered if that moves fewer bytes.
    fn sum(&mut self, k: &Kind, held: &Held, way: Way) -> Sum {
        let inputs: Vec<Held> = k.inputs.iter().map(|s| self.held(s, way)).collect();
        let gathered = Sum { reduced: self.free(k, held.used.axes(), &inputs), around: held.used };
        let reduced = self.free(k, 0, &inputs);
        if reduced == gathered.reduced {
            return gathered;
        }
        let summed = reduced.axes();
        // Of a dimension's axes those in front of one that splits the sum stay.
        let front = |set: Axes| self.site.axes(set).take_while(|a| summed >> a & 1 == 0).fold(0, |all, a| all | 1 << a);
        let dims = 0..k.own.shape.extents.len();
        let around = dims.fold(Splits::default(), |around, d| around.with(d, front(held.used.of(d))));
        let scattered = Sum { reduced, around };
        let traffic = |sum: &Sum| self.traffic(k, sum, held, &inputs);
        if traffic(&scattered) <= traffic(&gathered) { scattered } else { gathered }
    }

    /// The axes of each reduced dimension, as far as they are not used.
    fn free(&self, k: &Kind, mut used: Axes, inputs: &[Held]) -> Splits {
        let mut of = |(d, at): (&Dim, &Vec<(usize, usize)>)| {
            let mut all = at.iter().map(|(input, at)| {
                let held = &inputs[*input];
                (if k.passes { held.used } else { held.split }).of(*at) & !used
            });
            let axes = all.find(|a| *a != 0).unwrap_or(0);
            let enough = self.outline.program.chunking.count(&d.name, d.size) >= self.site.shards(axes);
            let axes = if enough { axes } else { 0 };
            used |= axes;
            axes
        };
        let dims = k.reduced.iter().zip(&k.reduced_at).enumerate();
        dims.fold(Splits::default(), |free, (i, dim)| free.with(i, of(dim)))
    }

    /// Bytes that the device receives of inputs and of parts of the sum.
    fn traffic(&self, k: &Kind, sum: &Sum, held: &Held, inputs: &[Held]) -> usize {
        let computed = self.site.region(&k.own.shape, sum.around);
        let done = self.site.region(&k.own.shape, held.used);
        let at = self.points(k, sum, &computed);
        let types: Vec<_> = k.types.iter().collect();
        let mut bytes = 0;
        for (i, h) in inputs.iter().enumerate() {
            let needed = k.op.op().needs(i, &types, &k.ty, &at);
            bytes += (needed.elements() - needed.intersect(&h.region).elements()) * k.inputs[i].shape.element;
        }
        let group = self.site.shards(sum.reduced.axes());
        let others = if group > 1 { self.tree_nodes(k, sum.reduced) * (group - 1) } else { 0 };
        let elements = match computed == done {
            true => (others + group - 1) * done.elements() / group,
            false => others * done.elements(),
        };
        bytes + elements * k.own.shape.element
    }

    /// Seconds of the all-reduce, or reduce-scatter, of nodes of `computed` to `done`.
    fn finish(&self, axes: Axes, nodes: usize, computed: &Region, done: &Region, k: &Kind) -> f64 {
        let element = k.own.shape.element;
        let group = self.site.shards(axes);
        let elements = computed.elements();
        let scattered = computed != done;
        let shared = !scattered && elements >= SEGMENTED;
        let segment = match (scattered, shared) {
            (true, _) => done.elements(),
            (false, true) => elements.div_ceil(group),
            (false, false) => elements,
        };
        let each = (nodes * segment + if shared { segment } else { 0 }) * element;
        let copied = match (scattered, shared) {
            (true, _) if crate::plan::exchange::contiguous(done, computed) => 0,
            (true, _) => nodes * segment * group,
            (false, true) => elements - segment,
            (false, false) => 0,
        };
        let parts = nodes * group;
        let bytes = (((parts + 1) * segment + 2 * copied) * element) as f64;
        let cost = Cost { flops: ((parts - 1) * segment) as f64, bytes };
        let peers = self.peers(axes);
        let messages = peers.map(|n| if n > 0 { nodes + usize::from(shared) } else { 0 });
        let class = if scattered { "reduce-scatter" } else { "all-reduce" };
        self.collective(class, cost, messages, peers.map(|n| (n * each) as f64), self.beside(k))
    }

    fn work(&mut self, w: &Work, way: Way) -> f64 {
        let kind = &self.outline.kinds[w.kind];
        let p = self.node(w.kind, way);
        let stored = |s: &Prices, at: &Region| s.bytes(&w.stores, at, way);
        match &w.form {
            Form::Map => {
                let cost =
                    Cost { flops: each(w, &p.at), bytes: self.bytes(&w.loads, &p.at, way) + stored(self, &p.at) };
                self.seconds("map", "default", cost, DType::F32)
            }
            Form::Reduce => {
                let out = w.stores.len() as f64 * result(kind, &p);
                let cost = Cost { flops: each(w, &p.at), bytes: self.bytes(&w.loads, &p.at, way) + out };
                self.seconds("reduce", "default", cost, DType::F32)
            }
            Form::Op => self.op(w.kind, &p, way, [result(kind, &p), 0.0]),
            Form::Epilogue(reduces) => {
                let at = &self.node(w.then.unwrap_or(w.kind), way).at.clone();
                let (loads, stores) = (self.bytes(&w.loads, at, way), stored(self, at));
                let is_moved = *reduces && self.inputs(w.kind, &p, way)[0].moved;
                if p.is_whole() && !is_moved {
                    return self.op(w.kind, &p, way, [loads + stores, each(w, at)]);
                }
                // What is finished by others is stored first; sums behind what is moved read what was stored.
                let (first, read) = if p.is_whole() { (stores, 0.0) } else { (result(kind, &p), own(kind, &p)) };
                let class = if *reduces { "reduce" } else { "map" };
                let cost = Cost { flops: each(w, at), bytes: loads + stores + read };
                self.op(w.kind, &p, way, [first, 0.0]) + self.seconds(class, "default", cost, DType::F32)
            }
            Form::Band(members) => self.band(w, members, way),
        }
    }

    /// Seconds of steps that are done slice by slice, where what is between them stays in the cache; of the steps one by one
    /// where something of that is finished by others.
    fn band(&mut self, w: &Work, members: &[usize], way: Way) -> f64 {
        let outline = self.outline;
        let works: Vec<&Work> = members.iter().map(|m| &outline.works[*m]).collect();
        if works.iter().any(|m| !self.node(m.kind, way).is_whole()) {
            return members.iter().map(|m| self.step(*m, way)).sum();
        }
        let (mut flops, mut dtype) = (0.0, DType::F32);
        for m in works {
            let (kind, p) = (&outline.kinds[m.kind], self.node(m.kind, way));
            let loop_at = m.then.map_or_else(|| p.clone(), |then| self.node(then, way));
            if matches!(m.form, Form::Op | Form::Epilogue(_)) {
                flops += own_flops(kind, &p);
                dtype = half_factors(kind).unwrap_or(dtype);
            }
            flops += each(m, &loop_at.at);
        }
        let at = &self.node(w.kind, way).at.clone();
        let bytes = self.bytes(&w.loads, at, way) + self.bytes(&w.stores, at, way);
        self.seconds("band", "product", Cost { flops, bytes }, dtype)
    }

    /// Bytes of tensors in a loop over `at`.
    fn bytes(&self, shapes: &[Shape], at: &Region, way: Way) -> f64 {
        shapes.iter().map(|s| (local(at, s, &self.site, way) * s.element) as f64).sum()
    }

    /// Seconds of an op, with so many bytes and FLOPs beside its own reading and computing.
    fn op(&mut self, kind: usize, p: &Priced, way: Way, [bytes, flops]: [f64; 2]) -> f64 {
        let outline = self.outline;
        let k = &outline.kinds[kind];
        let op = k.op.op();
        if op.copies() {
            let cost = Cost { flops: 0.0, bytes: 2.0 * own(k, p) };
            return self.seconds("copy", "default", cost, DType::F32);
        }
        let read: f64 = match &k.op {
            Prim::Gather(_) => own(k, p) + self.inputs(kind, p, way)[1..].iter().map(|i| i.reads).sum::<f64>(),
            _ => self.inputs(kind, p, way).iter().map(|i| i.reads).sum(),
        };
        let mut flops = own_flops(k, p) + flops;
        if !k.op.is_product() {
            return self.seconds(op.name(), "default", Cost { flops, bytes: read + bytes }, DType::F32);
        }
        let dtype = half_factors(k).unwrap_or(DType::F32);
        let machine = self.site.machine;
        let depth = if dtype == DType::Bf16 { 2 * machine.depth } else { machine.depth };
        flops += 2.0 * (p.computed.elements() * p.leaves * depth) as f64;
        let inner = p.computed.0.last().map_or(1, |(_, r)| r.len()).max(1);
        flops *= inner.next_multiple_of(machine.columns) as f64 / inner as f64;
        self.seconds(op.name(), "product", Cost { flops, bytes: read + bytes }, dtype)
    }
}

/// By kind of step: seconds that it takes on one device, beside its launch.
pub fn alone(outline: &Outline, machine: &Machine) -> Vec<f64> {
    let (mesh, mut machine) = (Mesh::single(), machine.clone());
    machine.rates.values_mut().for_each(|rate| rate.launch = 0.0);
    let site = Site::new(&mesh, Pipeline { depth: 1, micro: 1 }, &machine, outline.most_chunks());
    let mut prices = Prices::new(outline, site, true);
    (0..outline.works.len()).map(|work| prices.step(work, Way::default())).collect()
}

impl Priced {
    /// Whether the device computes its results alone.
    fn is_whole(&self) -> bool {
        self.sum == 0.0 && self.nodes == 1
    }
}

/// Over which axes the dimensions of what a node needs of an input are split, as far as the node has them too.
fn split_of(k: &Kind, input: usize, sum: &Sum, needs: &Region) -> Splits {
    if sum.around.0 | sum.reduced.0 == 0 {
        return Splits::default();
    }
    let axes_of = |name: &Name| {
        let own = k.own.shape.extents.iter().position(|e| e.dim.name == *name).map(|i| sum.around.of(i));
        let reduced = || k.reduced.iter().position(|d| d.name == *name).map(|i| sum.reduced.of(i));
        own.or_else(reduced).unwrap_or(0)
    };
    let dims = k.inputs[input].shape.extents.iter().zip(&needs.0).enumerate();
    let parts = dims.filter(|(_, (e, (_, range)))| range.len() < e.dim.size);
    parts.fold(Splits::default(), |split, (d, (_, (name, _)))| split.with(d, axes_of(name)))
}

/// Bytes of a node's result.
fn own(k: &Kind, p: &Priced) -> f64 {
    (p.computed.elements() * k.own.shape.element) as f64
}

/// Bytes of what a node stores: its result, or parts of it.
fn result(k: &Kind, p: &Priced) -> f64 {
    p.nodes as f64 * own(k, p)
}

/// Operations of the loop of a step.
fn each(w: &Work, at: &Region) -> f64 {
    (w.arithmetic * at.elements()) as f64
}

/// Operations of the device's share of an op.
fn own_flops(k: &Kind, p: &Priced) -> f64 {
    let mut share = p.computed.elements() as f64 / k.ty.elements().max(1) as f64;
    for d in &k.reduced {
        share *= p.at.get(&d.name).map_or(d.size, |r| r.len()) as f64 / d.size.max(1) as f64;
    }
    k.flops * share
}

/// The dtype of a product's factors, if they are all of one of 16 bits.
fn half_factors(k: &Kind) -> Option<DType> {
    let half = k.types.first().map(|t| t.dtype).filter(|d| k.op.is_product() && d.is_half())?;
    k.types.iter().all(|t| t.dtype == half).then_some(half)
}

/// Elements of a tensor in a loop over `at`: along dimensions that the loop does not have, what the device holds.
fn local(at: &Region, shape: &Shape, site: &Site, way: Way) -> usize {
    let mut own = None;
    let mut extent = |i: usize| {
        let own = own.get_or_insert_with(|| site.region(shape, site.split(shape, way)));
        own.0[i].1.len()
    };
    let names = shape.extents.iter().enumerate();
    names.map(|(i, e)| at.get(&e.dim.name).map_or_else(|| extent(i), |r| r.len())).product()
}

/// What the move is called.
fn exchange(held: &Held, wanted: &Region) -> &'static str {
    if !wanted.contains(&held.region) {
        return "all-to-all";
    }
    let mut dims = held.region.0.iter().zip(&wanted.0).enumerate();
    // A gather ends with all of a dimension.
    let is_whole = |h: &Range<usize>, w: &Range<usize>| h != w && w.start == 0 && w.len() >= 2 * h.len();
    let whole = dims.any(|(i, ((_, h), (_, w)))| held.split.of(i) != 0 && is_whole(h, w));
    if whole { "all-gather" } else { "halo" }
}
