//! The plan of each device: the function's steps on what the device has, with their offsets.

use super::DevicePlan;
use super::function::Planner;
use super::fuse::Group;
use super::memory::{self, Tenant};
use super::step::{BoxCopy, Buffer, CopyWork, IDLE, Label, Step, Work};
use super::timeline::{Blocks, Timeline};
use crate::dim::Name;
use crate::spmd::ValueId;
use std::num::NonZero;
use std::ops::Range;
use std::sync::Arc;
use std::thread;

/// A device's part of a step, and its scratch; None if there is nothing to do.
type Worked = Option<(Work, usize)>;

/// Which of a device's tenants is what: its own values lie first.
#[derive(Clone, Copy)]
pub(super) struct Parts {
    /// The first of the values that go to variables at the end.
    pub staged: usize,
    /// The first scratch of a step.
    pub scratch: usize,
}

/// What a step has in common on all devices.
struct Common {
    reads: Vec<ValueId>,
    label: Arc<Label>,
    /// Where there is nothing to do.
    idle: Arc<Label>,
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
    pub(super) fn devices_plans(&self, devices: Range<usize>) -> Vec<(DevicePlan, Timeline)> {
        let groups: Vec<Common> = self.groups().iter().map(|g| self.common(g)).collect();
        let works = on_threads(devices.clone().collect(), |d: usize| {
            self.groups().iter().map(|g| self.work(g, self.view(d))).collect::<Vec<Worked>>()
        });
        // Devices with the same tenants have the same places.
        let base = self.cx.base;
        let (mut of, mut firsts): (Vec<usize>, Vec<(usize, Vec<Tenant>)>) = Default::default();
        for (d, works) in devices.clone().zip(&works) {
            let tenants = self.tenants(d, works);
            let alike = firsts.iter().position(|(first, t)| base[*first] == base[d] && *t == tenants);
            of.push(alike.unwrap_or(firsts.len()));
            firsts.extend(alike.is_none().then_some((d, tenants)));
        }
        let blocks = self.blocks();
        let mut classes = on_threads(firsts, |(d, tenants)| self.class(d, tenants, &blocks));
        let timelines: Vec<Timeline> =
            devices.clone().zip(&of).map(|(d, of)| self.told(d, &mut classes[*of])).collect();
        let parts = devices.zip(of).zip(works.into_iter().zip(timelines)).collect();
        on_threads(parts, |((d, of), (works, timeline))| (self.device(d, works, &classes[of], &groups), timeline))
    }

    fn common(&self, group: &Group) -> Common {
        let label = |op: &str| Arc::new(self.label(group.outputs[0], op.into()));
        Common { reads: self.reads(group), label: label(self.name(group)), idle: label(IDLE) }
    }

    /// The class of a device with these tenants.
    fn class(&self, device: usize, tenants: Vec<Tenant>, blocks: &Blocks) -> Class {
        let base = self.cx.base[device];
        let (buffers, end) = memory::place(&tenants, base);
        let timeline = self.timeline(device, &tenants, base, blocks);
        Class { tenants, buffers, end, timeline, told: vec![] }
    }

    /// Which of a device's tenants is what.
    pub(super) fn parts(&self) -> Parts {
        Parts { staged: self.lives.len(), scratch: self.lives.len() + self.copies.len() }
    }

    /// The plan of a device of a class.
    fn device(&self, device: usize, works: Vec<Worked>, class: &Class, groups: &[Common]) -> DevicePlan {
        let (buffers, parts) = (&class.buffers, self.parts());
        let mut steps: Vec<Step> = Vec::with_capacity(works.len() + self.kept.len() + 2 * self.copies.len());
        for (g, (work, common)) in works.into_iter().zip(groups).enumerate() {
            let (work, reads, label) = match work {
                Some((work, _)) => (work, &*common.reads, &common.label),
                None => (Work::Copy(CopyWork::default()), &[][..], &common.idle),
            };
            steps.push(Step {
                work,
                inputs: reads.iter().map(|v| self.buffer(*v, device, buffers)).collect(),
                outputs: self.groups()[g].outputs.iter().map(|v| self.buffer(*v, device, buffers)).collect(),
                scratch: buffers[parts.scratch + g],
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

    /// What needs a place on a device.
    fn tenants(&self, device: usize, works: &[Worked]) -> Vec<Tenant> {
        let end = self.end();
        let lives = self.lives.iter().map(|l| Tenant { bytes: l.bytes[device], from: l.from, to: l.to });
        // Values that are copied to variables at the end, by way of a buffer each, since one may be the other's old value.
        let copies = self.copies.iter().map(|(v, _)| {
            let bytes = self.cx.spmd.values[v.index()].bytes(device);
            Tenant { bytes, from: end, to: end }
        });
        let scratch = works.iter().enumerate().map(|(g, w)| Tenant {
            bytes: w.as_ref().map_or(0, |(_, scratch)| *scratch),
            from: g,
            to: g,
        });
        lives.chain(copies).chain(scratch).collect()
    }

    fn label(&self, v: ValueId, op: Name) -> Label {
        let node = self.cx.spmd.values[v.index()].node;
        let n = self.cx.function.node(node);
        Label { op, scope: n.scope.clone(), place: n.place, node }
    }

    /// Walks through the steps and holds that each finds in memory what it reads.
    fn verify(&self, device: usize, buffers: &[Buffer], first_scratch: usize) {
        let mut held: Vec<(Buffer, ValueId)> = Vec::new();
        let overlap = |a: Buffer, b: Buffer| a.offset < b.offset + b.bytes && b.offset < a.offset + a.bytes;
        let given = self.cx.spmd.inputs.iter().map(|(_, v)| v).chain(self.cx.spmd.reads.iter().map(|(_, v)| v));
        for v in given {
            held.push((self.buffer(*v, device, buffers), *v));
        }
        for (g, group) in self.groups().iter().enumerate() {
            for &v in &group.inputs {
                let at = self.buffer(v, device, buffers);
                let found = at.bytes == 0 || held.contains(&(at, v));
                assert!(found, "{group:?} reads {v:?}, which is not at {at:?}: {held:?}");
            }
            let written = group.outputs.iter().map(|&v| (self.buffer(v, device, buffers), Some(v)));
            for (at, v) in written.chain([(buffers[first_scratch + g], None)]) {
                held.retain(|(b, _)| !overlap(*b, at));
                held.extend(v.map(|v| (at, v)));
            }
        }
        for (_, v) in &self.cx.spmd.outputs {
            let v = self.root(*v);
            let at = self.buffer(v, device, buffers);
            assert!(at.bytes == 0 || held.contains(&(at, v)), "the result {v:?} is not at {at:?}");
        }
    }
}

/// `make` of each item, in their order, on as many threads as there are cores.
fn on_threads<T: Send, U: Send>(items: Vec<T>, make: impl Fn(T) -> U + Sync) -> Vec<U> {
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
            pipeline::order(&mut spmd, function, layout.schedule());
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
