//! The plan of each device: the function's steps on what the device has, with their offsets. First there is one with every
//! collective in one step; then `overlap` takes some of them apart, and where that takes no memory beyond it is the plan.

use super::DevicePlan;
use super::function::Planner;
use super::fuse::Group;
use super::memory::{self, Tenant};
use super::overlap::{Moment, Phase, numbers};
use super::step::{Begun, BoxCopy, Buffer, CopyWork, IDLE, Label, Segments, Step, Work};
use super::timeline::{Blocks, Timeline};
use crate::dim::Name;
use crate::spmd::ValueId;
use std::collections::HashMap;
use std::num::NonZero;
use std::ops::Range;
use std::sync::Arc;
use std::thread;

/// A device's part of a group, and its scratch; None if there is nothing to do.
pub(super) type Worked = Option<(Work, usize)>;

/// Which of a device's tenants is what: its own values lie first.
#[derive(Clone, Copy)]
pub(super) struct Parts {
    /// The first of the values that go to variables at the end.
    pub staged: usize,
    /// The first scratch of a step.
    pub scratch: usize,
}

/// What the steps of a group have in common on all devices.
struct Common {
    reads: Vec<ValueId>,
    label: Arc<Label>,
    /// What its later steps are called.
    later: [Arc<Label>; 2],
    /// Where there is nothing to do.
    idle: Arc<Label>,
}

/// Where everything lies on devices whose tenants are alike.
pub(super) struct Place {
    /// The first of them.
    device: usize,
    tenants: Vec<Tenant>,
    buffers: Vec<Buffer>,
    /// The end of what it takes.
    pub end: usize,
}

/// The memory of devices whose tenants are alike.
pub(super) struct Class {
    pub tenants: Vec<Tenant>,
    buffers: Vec<Buffer>,
    end: usize,
    /// What their timelines have in common.
    pub timeline: Timeline,
    /// Devices whose largest tenants are told apart, each with how it tells of them.
    pub told: Vec<(usize, Timeline)>,
}

impl Planner<'_> {
    /// The plans of some devices.
    pub(super) fn devices_plans(&mut self, devices: Range<usize>) -> Vec<(DevicePlan, Timeline)> {
        let groups: Vec<Common> = self.groups().iter().map(|g| self.common(g)).collect();
        let works: Vec<Vec<Worked>> = on_threads((0..self.devices()).collect(), |d: usize| {
            self.groups().iter().map(|g| self.work(g, self.view(d))).collect()
        });
        let (of, places, waiting) = self.overlap(&works);
        let blocks = self.blocks();
        let mut classes = on_threads(places, |place| self.class(place, &blocks));
        let of: Vec<usize> = devices.clone().map(|d| of[d]).collect();
        let timeline =
            |(d, of): (usize, &usize)| Timeline { waiting: waiting[d].clone(), ..self.told(d, &mut classes[*of]) };
        let timelines: Vec<Timeline> = devices.clone().zip(&of).map(timeline).collect();
        let works = works.into_iter().skip(devices.start);
        let parts = devices.zip(of).zip(works.zip(timelines)).collect();
        let numbers = numbers(&self.moments);
        on_threads(parts, |((d, of), (works, timeline))| {
            (self.device(d, works, &classes[of], &groups, &numbers), timeline)
        })
    }

    fn common(&self, group: &Group) -> Common {
        let label = |op: &str| Arc::new(self.label(group.outputs[0], op.into()));
        let name = self.name(group);
        let later = ["combine", "finish"].map(|what| label(&format!("{what} {name}")));
        Common { reads: self.reads(group), label: label(name), later, idle: label(IDLE) }
    }

    /// Where everything lies on each device: by device its class, and of each class the first device. Devices with the same
    /// tenants have the same places, which end within a limit for each device if they can.
    pub(super) fn places(&self, works: &[Vec<Worked>], limits: Option<&[usize]>) -> (Vec<usize>, Vec<Place>) {
        let base = self.cx.base;
        let (mut of, mut firsts): (Vec<usize>, Vec<(usize, Vec<Tenant>)>) = Default::default();
        for (d, works) in works.iter().enumerate() {
            let tenants = self.tenants(d, works);
            let alike = firsts.iter().position(|(first, t)| base[*first] == base[d] && *t == tenants);
            of.push(alike.unwrap_or(firsts.len()));
            firsts.extend(alike.is_none().then_some((d, tenants)));
        }
        let place = |(device, tenants): (usize, Vec<Tenant>)| {
            let limit = limits.map_or(usize::MAX, |l| l[device]);
            let (buffers, end) = memory::place_within(&tenants, base[device], limit);
            Place { device, tenants, buffers, end }
        };
        (of, on_threads(firsts, place))
    }

    /// The class of devices with these places.
    fn class(&self, place: Place, blocks: &Blocks) -> Class {
        let timeline = self.timeline_of(&place, blocks);
        let Place { tenants, buffers, end, .. } = place;
        Class { tenants, buffers, end, timeline, told: vec![] }
    }

    /// What the timelines of devices with these places have in common.
    pub(super) fn timeline_of(&self, place: &Place, blocks: &Blocks) -> Timeline {
        self.timeline(place.device, &place.tenants, self.cx.base[place.device], blocks)
    }

    /// Which of a device's tenants is what.
    pub(super) fn parts(&self) -> Parts {
        Parts { staged: self.lives.len(), scratch: self.lives.len() + self.copies.len() }
    }

    /// The plan of a device of a class, with the numbers of what is under way.
    fn device(
        &self,
        device: usize,
        mut works: Vec<Worked>,
        class: &Class,
        groups: &[Common],
        numbers: &HashMap<usize, usize>,
    ) -> DevicePlan {
        let (buffers, parts) = (&class.buffers, self.parts());
        for (group, number) in numbers {
            match &mut works[*group] {
                Some((Work::Exchange(e), _)) => Arc::make_mut(e).under_way = Some(*number),
                Some((Work::AllReduce(a), _)) => Arc::make_mut(a).under_way = Some(*number),
                _ => {}
            }
        }
        let mut steps: Vec<Step> = Vec::with_capacity(self.end() + self.kept.len() + 2 * self.copies.len());
        for moment in &self.moments {
            let (g, common) = (moment.group, &groups[moment.group]);
            let work = match (moment.phase, &mut works[g]) {
                (Phase::Whole, work) => work.take().map(|(work, _)| work),
                (phase @ (Phase::Interior | Phase::Rim), Some((Work::Op(op), _))) => {
                    self.in_two(&self.groups()[g], device, op, phase)
                }
                (phase, work) => work.as_ref().and_then(|(work, _)| later(work, phase)),
            };
            let idle = work.is_none();
            let (reads, label) = match moment.phase {
                _ if idle => (&[][..], &common.idle),
                Phase::Whole | Phase::Begin | Phase::Interior | Phase::Rim => (&*common.reads, &common.label),
                Phase::Combine => (&*common.reads, &common.later[0]),
                Phase::Finish => (self.looks_at(*moment), &common.later[1]),
            };
            let writes = if idle { self.opens(*moment) } else { self.touches(*moment) };
            steps.push(Step {
                work: work.unwrap_or_else(|| Work::Copy(CopyWork::default())),
                inputs: reads.iter().map(|v| self.buffer(*v, device, buffers)).collect(),
                outputs: writes.iter().map(|v| self.buffer(*v, device, buffers)).collect(),
                scratch: if self.has_scratch(*moment) { buffers[parts.scratch + g] } else { Buffer::default() },
                label: label.clone(),
            });
        }
        if cfg!(debug_assertions) {
            self.verify(device, buffers, parts.scratch);
        }
        let copy = |v: ValueId, from: Buffer, to: Buffer| {
            let part = self.part(v, self.view(device));
            let n = part.region.elements();
            let line = BoxCopy { extents: vec![n], from: 0, from_strides: vec![1], to: 0, to_strides: vec![1] };
            let work = Work::Copy(CopyWork { element: part.ty.dtype.bytes(), fill: None, boxes: vec![(0, line)] });
            let label = Arc::new(self.label(v, "assign".into()));
            Step { work, inputs: vec![from], outputs: vec![to], scratch: Buffer::default(), label }
        };
        for (v, life) in &self.kept {
            steps.push(copy(*v, self.buffer(*v, device, buffers), buffers[*life]));
        }
        for (i, (v, _)) in self.copies.iter().enumerate() {
            steps.push(copy(*v, self.buffer(*v, device, buffers), buffers[parts.staged + i]));
        }
        for (i, (v, var)) in self.copies.iter().enumerate() {
            steps.push(copy(*v, buffers[parts.staged + i], self.cx.variables[device][var.index()].1));
        }
        let kept = |v: ValueId| self.kept.iter().find(|(k, _)| *k == self.root(v)).map(|(_, life)| buffers[*life]);
        let edge = |list: &[(Name, ValueId)]| {
            let at = |v| kept(v).unwrap_or_else(|| self.buffer(v, device, buffers));
            list.iter().map(|(n, v)| (n.clone(), self.part(*v, self.view(device)), at(*v))).collect()
        };
        let (inputs, outputs) = (edge(&self.cx.spmd.inputs), edge(&self.cx.spmd.outputs));
        DevicePlan { steps, arena_bytes: class.end, inputs, outputs }
    }

    /// The values whose memory is written at a moment.
    fn touches(&self, moment: Moment) -> &[ValueId] {
        match moment.phase {
            Phase::Finish | Phase::Rim => self.makes(moment),
            Phase::Whole | Phase::Begin | Phase::Combine | Phase::Interior => self.opens(moment),
        }
    }

    /// What needs a place on a device.
    fn tenants(&self, device: usize, works: &[Worked]) -> Vec<Tenant> {
        let end = self.end();
        let lives = self.lives.iter().map(|l| Tenant { bytes: l.bytes[device], from: l.from, to: l.to });
        // Values that are copied to variables at the end, by way of a buffer each, since one may be the other's old value.
        let copies = self.copies.iter().map(|(v, _)| {
            let bytes = self.cx.spmd.values[v.index()].bytes(device);
            Tenant { bytes, from: end, to: end }
        });
        let mut from_to = vec![(usize::MAX, 0); works.len()];
        for (m, moment) in self.moments.iter().enumerate().filter(|(_, m)| self.has_scratch(**m)) {
            let (from, to) = from_to[moment.group];
            from_to[moment.group] = (m.min(from), m.max(to));
        }
        let scratch = works.iter().zip(from_to).map(|(w, (from, to))| Tenant {
            bytes: w.as_ref().map_or(0, |(_, scratch)| *scratch),
            from,
            to,
        });
        lives.chain(copies).chain(scratch).collect()
    }

    fn label(&self, v: ValueId, op: Name) -> Label {
        let node = self.cx.spmd.values[v.index()].node;
        let n = self.cx.function.node(node);
        Label { op, scope: n.scope.clone(), place: n.place, node }
    }

    /// Walks through the steps and holds that each finds in memory what it reads, and that nobody writes where something is
    /// on its way.
    fn verify(&self, device: usize, buffers: &[Buffer], first_scratch: usize) {
        let mut held: Vec<(Buffer, ValueId)> = Vec::new();
        // What is being written, by whom.
        let mut open: Vec<(Buffer, usize)> = Vec::new();
        let overlap = |a: Buffer, b: Buffer| a.offset < b.offset + b.bytes && b.offset < a.offset + a.bytes;
        let given = self.cx.spmd.inputs.iter().map(|(_, v)| v).chain(self.cx.spmd.reads.iter().map(|(_, v)| v));
        for v in given {
            held.push((self.buffer(*v, device, buffers), *v));
        }
        for moment in &self.moments {
            let group = &self.groups()[moment.group];
            let at = |v: &ValueId| (self.buffer(*v, device, buffers), *v);
            for (at, v) in self.looks_at(*moment).iter().map(at) {
                let found = at.bytes == 0 || held.contains(&(at, v));
                assert!(found, "{group:?} reads {v:?}, which is not at {at:?}: {held:?}");
            }
            let scratch = Some(buffers[first_scratch + moment.group]).filter(|_| self.has_scratch(*moment));
            let written = self.touches(*moment).iter().map(|v| at(v).0).chain(scratch);
            for at in written {
                // What a convolution reads where it writes it still has to read for its rim.
                let stays = |v: &ValueId| moment.phase == Phase::Interior && group.inputs.contains(v);
                held.retain(|(b, v)| !overlap(*b, at) || stays(v));
                let free = open.iter().all(|(b, by)| *by == moment.group || !overlap(*b, at));
                assert!(free, "{group:?} writes at {at:?}, where something is on its way: {open:?}");
                open.push((at, moment.group));
            }
            if moment.phase == Phase::Combine {
                open.retain(|(b, by)| *by != moment.group || Some(*b) != scratch);
            }
            if moment.phase == Phase::Whole || !self.makes(*moment).is_empty() {
                held.extend(self.makes(*moment).iter().map(at));
                open.retain(|(_, by)| *by != moment.group);
            }
        }
        for (_, v) in &self.cx.spmd.outputs {
            let v = self.root(*v);
            let at = self.buffer(v, device, buffers);
            assert!(at.bytes == 0 || held.contains(&(at, v)), "the result {v:?} is not at {at:?}");
        }
    }
}

/// A step of a collective that goes on while others are done; None if there is nothing to do in it.
fn later(work: &Work, phase: Phase) -> Option<Work> {
    match (work, phase) {
        (_, Phase::Whole | Phase::Begin) => Some(work.clone()),
        (Work::AllReduce(a), Phase::Combine) => Some(Work::Combine(a.clone())),
        (Work::Exchange(e), Phase::Finish) => Some(Work::Finish(Begun::Exchange(e.clone()))),
        (Work::AllReduce(a), Phase::Finish) => {
            (a.segments == Segments::Shared).then(|| Work::Finish(Begun::AllReduce(a.clone())))
        }
        (_, Phase::Combine | Phase::Finish | Phase::Interior | Phase::Rim) => None,
    }
}

/// `make` of each item, in their order, on as many threads as there are cores.
pub(crate) fn on_threads<T: Send, U: Send>(items: Vec<T>, make: impl Fn(T) -> U + Sync) -> Vec<U> {
    let threads = thread::available_parallelism().map_or(1, NonZero::get).min(items.len()).max(1);
    let each = items.len().div_ceil(threads).max(1);
    let mut items = items.into_iter();
    let shares: Vec<Vec<T>> = (0..threads).map(|_| items.by_ref().take(each).collect()).collect();
    thread::scope(|scope| {
        let make = &make;
        let run = |share: Vec<T>| scope.spawn(move || share.into_iter().map(make).collect::<Vec<U>>());
        let running: Vec<_> = shares.into_iter().map(run).collect();
        let done = running.into_iter().map(|t| t.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        done.flatten().collect()
    })
}

#[cfg(test)]
mod tests {
    use super::super::{ALIGN, Backend, PlanOptions, function, plan_program};
    use super::*;
    use crate::dim::{DType, dim};
    use crate::graph::Tensor;
    use crate::layout::{Layout, Mesh};
    use crate::nn::{self, Kernel};
    use crate::ops::window::Window;
    use crate::optim::Optimizer;
    use crate::pipeline;
    use crate::placement::Placement;
    use crate::program::{Program, ProgramBuilder};
    use crate::spmd;

    struct Plain;

    impl Backend for Plain {
        fn scratch_bytes(&self, work: &Work) -> usize {
            match work {
                Work::Op(op) => op.output.region.elements(),
                _ => 0,
            }
        }
        fn workspace_bytes(&self) -> usize {
            0
        }
    }

    /// Convolutions and a pool in two scopes, to be trained, with a block that is made again.
    fn program() -> Program {
        let mut p = ProgramBuilder::recomputing(&["upper".into()]);
        p.function("train", |g| {
            let image = [dim("batch", 4), dim("x", 24), dim("y", 16), dim("channel", 2)];
            let x = g.input("image", DType::F32, &image);
            let kernel = Kernel::new(&["x", "y"], 3).from_channel("channel");
            let conv = |x: &Tensor, name: &str, channels| nn::conv(x, name, &kernel, &dim("channel", channels)).relu();
            let x = g.scoped("lower", || conv(&x, "first", 4).max_pool(&[Window::same("x", 24, 2, 2, 1)]));
            let x = g.block("upper", || g.scoped("upper", || conv(&conv(&x, "second", 4), "third", 8)));
            let loss = x.mean(&["batch", "x", "y", "channel"]);
            Optimizer::adam(0.1).clipped(1.0).apply(g, &loss);
            g.output("loss", &loss);
        })
        .unwrap();
        p.finish().unwrap()
    }

    #[test]
    fn a_device_that_is_planned_beside_others_has_the_plan_that_it_has_alone() {
        let program = program();
        let function = program.function("train").unwrap();
        for (mesh, layout, classes) in [
            ("data=4", "batch:data", 1),
            ("x=3", "x:x", 3),
            ("x=4", "x:x", 2),
            ("x=3,y=2", "x:x,y:y,variables{*:x},slots{*:x}", 3),
            ("data=2,x=5", "batch:data,x:x", 5),
            ("pipe=2,data=2", "@pipe:1,lower/**{@pipe:0},batch:data", 2),
        ] {
            let (mesh, layout): (Mesh, Layout) = (mesh.parse().unwrap(), layout.parse().unwrap());
            let plan = plan_program(&program, &mesh, &layout, &PlanOptions::default(), &Plain).unwrap();
            let placement = Placement::new(&mesh, &layout, &program);
            let mut spmd = spmd::lower(function, &placement).unwrap();
            pipeline::order(&mut spmd, function, layout.schedule(), false);
            let base = |held: &Vec<(_, Buffer)>| held.iter().map(|(_, b)| b.bytes.next_multiple_of(ALIGN)).sum();
            let base: Vec<usize> = plan.variables.iter().map(base).collect();
            let cx = function::Context {
                function,
                mesh: &mesh,
                spmd: &spmd,
                variables: &plan.variables,
                declared: &program.variables,
                base: &base,
                backend: &Plain,
                apart: false,
                waiting: false,
            };
            let all = plan.functions[&"train".into()].iter().zip(&plan.timelines[&"train".into()]);
            for (d, beside) in all.enumerate() {
                let alone = function::plan(&cx, d..d + 1);
                assert_eq!(
                    format!("{beside:?}"),
                    format!("{:?}", (&alone[0].0, &alone[0].1)),
                    "{d}, {layout} on {mesh}"
                );
            }
            let shared = |t: &Timeline| t.alive.as_ptr();
            let mut found: Vec<_> = plan.timelines[&"train".into()].iter().map(shared).collect();
            found.sort_unstable();
            found.dedup();
            assert!(found.len() <= classes, "{} classes of devices: {layout} on {mesh}", found.len());
        }
    }
}
