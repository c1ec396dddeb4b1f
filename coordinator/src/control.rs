//! What model programs and operators call.

use crate::checkpoint::Position;
use crate::crew::Active;
use crate::server::{Coordinator, Reply, Sent, invalid};
use mesh::array::Array;
use proto::control::{
    self, ArrayHead, ArrayName, ArrayPart, Done, Noted, OpenPart, Opened, SessionName, StatusReply, array_part::Kind,
    control_server, open_part, worker_client::WorkerClient,
};
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{StreamExt, iter};
use tonic::transport::Channel;
use tonic::{Request, Response, Status, Streaming};
use worker::recorder::now_ns;
use worker::service::foreseen;
use worker::wire::{self, Assembler, Sequence};

/// Shortest time between two reports to one who watches.
const WATCH: Duration = Duration::from_millis(200);
/// How long workers have to tell what their devices did.
const EVENTS_WITHIN: Duration = Duration::from_secs(10);
/// Parts of a stream that lie here for a worker at the most.
const PARTS_AHEAD: usize = 2;
/// Results of one number that are remembered for those who watch.
const RESULTS: usize = 64;

impl Coordinator {
    /// Passes boxes of tensors on to the workers whose devices hold them, part by part as they come.
    async fn spread<F>(
        &self,
        mut stream: Streaming<ArrayPart>,
        call: impl Fn(WorkerClient<Channel>, ReceiverStream<ArrayPart>) -> F,
    ) -> Reply<Done>
    where
        F: Future<Output = Result<Response<Done>, Status>> + Send + 'static,
    {
        let mut next = stream.next().await.transpose()?;
        let head = match &next {
            Some(ArrayPart { kind: Some(Kind::Head(head)) }) => head,
            Some(_) => return Err(invalid("C0013: a stream of arrays begins with a head")),
            // Of a tensor without elements nobody holds anything.
            None => return Ok(Response::new(Done {})),
        };
        let session = self.session(head.name.as_ref().map_or(0, |n| n.epoch))?;
        let (senders, mut receivers): (Vec<_>, Vec<_>) =
            session.crew.iter().map(|_| mpsc::channel(PARTS_AHEAD)).map(|(s, r)| (s, Some(r))).unzip();
        let pass = async {
            // Dropped at the end, so that workers' streams end.
            let (senders, mut sequence, mut to) = (senders, Sequence::default(), vec![]);
            while let Some(part) = next {
                sequence.take(&part).map_err(invalid)?;
                if let Some(Kind::Head(head)) = &part.kind {
                    to = session.holders(head)?;
                }
                for (place, holders) in &to {
                    let kind = match part.kind.clone() {
                        Some(Kind::Head(head)) => Some(Kind::Head(ArrayHead { holders: holders.clone(), ..head })),
                        kind => kind,
                    };
                    // A worker that takes no more says why in its answer.
                    let _ = senders[*place].send(ArrayPart { kind }).await;
                }
                next = stream.next().await.transpose()?;
            }
            sequence.end().map_err(invalid)
        };
        let taken = self.everywhere(&session, |client, place| {
            call(client, ReceiverStream::new(receivers[place].take().expect("each worker is called once")))
        });
        // What is wrong with the stream is no reason to stop: workers are cut off then, and write no box that is not whole.
        tokio::try_join!(pass, taken)?;
        Ok(Response::new(Done {}))
    }

    /// An answer, with what is to be said besides.
    fn noted(&self, session: &Active) -> Noted {
        Noted { notes: session.notes(), regroup: self.regroup(session), communicate_ns: 0, non_finite: vec![] }
    }
}

#[tonic::async_trait]
impl control_server::Control for Coordinator {
    type OpenStream = Sent<Opened>;

    async fn open(&self, request: Request<Streaming<OpenPart>>) -> Reply<Sent<Opened>> {
        let mut stream = request.into_inner();
        let (mut settings, mut program) = (None, Vec::new());
        while let Some(part) = stream.next().await {
            match part?.kind {
                Some(open_part::Kind::Settings(s)) => settings = Some(s),
                Some(open_part::Kind::Program(b)) if program.len() + b.len() <= wire::PROGRAM_BYTES => {
                    program.extend_from_slice(&b);
                }
                _ => return Err(invalid("C0018: a program beyond all bounds")),
            }
        }
        let settings = settings.ok_or_else(|| invalid("C0018: a session without settings"))?;
        // A session that nobody waits for any more is closed all the same: the task goes on without the caller.
        let this = self.clone();
        let opened = tokio::spawn(async move {
            let (session, links) = this.open_session(settings, program.into()).await?;
            tracing::info!(epoch = session.epoch, "a session begins on {} workers", session.crew.len());
            let (send, receive) = mpsc::channel(1);
            let opened = Opened { epoch: session.epoch, links, mesh: session.settings.mesh.clone() };
            let _ = send.send(Ok(opened)).await;
            tokio::spawn(async move {
                send.closed().await;
                tracing::info!(epoch = session.epoch, "the session ends");
                this.close(&session).await;
            });
            Ok::<_, Status>(receive)
        });
        let receive = opened.await.map_err(|e| Status::internal(e.to_string()))??;
        Ok(Response::new(Box::pin(ReceiverStream::new(receive))))
    }

    async fn feed(&self, request: Request<Streaming<ArrayPart>>) -> Reply<Done> {
        self.spread(request.into_inner(), |mut client, parts| async move { client.feed(parts).await }).await
    }

    async fn set(&self, request: Request<Streaming<ArrayPart>>) -> Reply<Done> {
        self.spread(request.into_inner(), |mut client, parts| async move { client.set(parts).await }).await
    }

    async fn step(&self, request: Request<control::StepRequest>) -> Reply<Noted> {
        let r = request.into_inner();
        let session = self.session(r.epoch)?;
        let ran = self.everywhere(&session, |mut client, _| {
            let r = r.clone();
            async move { client.run(r).await.map(|ran| ran.into_inner()) }
        });
        let ran = ran.await?;
        let communicate_ns = ran.iter().map(|r| r.communicate_ns).max().unwrap_or(0);
        let mut first = vec![];
        let all = ran.into_iter().flat_map(|r| r.non_finite).map(wire::non_finite_of);
        all.for_each(|f| f.keep_first(&mut first));
        let non_finite = first.iter().map(wire::non_finite).collect();
        session.steps.fetch_add(1, Ordering::Relaxed);
        self.changed();
        Ok(Response::new(Noted { communicate_ns, non_finite, ..self.noted(&session) }))
    }

    type FetchStream = Sent<ArrayPart>;

    async fn fetch(&self, request: Request<ArrayName>) -> Reply<Sent<ArrayPart>> {
        let name = request.into_inner();
        let session = self.session(name.epoch)?;
        let whole = self.gather(&session, &name).await?;
        if let (Some(value), false) = (whole.to_f32(), name.function.is_empty()) {
            let mut state = self.state();
            if state.results.len() < RESULTS || state.results.contains_key(&name.name) {
                state.results.insert(name.name.clone(), value);
            }
        }
        let parts = wire::parts(name, vec![], &vec![0; whole.shape().len()], &whole);
        Ok(Response::new(Box::pin(iter(parts.map(Ok)))))
    }

    async fn checkpoint(&self, request: Request<control::CheckpointRequest>) -> Reply<Noted> {
        let r = request.into_inner();
        let session = self.session(r.epoch)?;
        let config = serde_json::from_slice(&r.config);
        let config = config.map_err(|e| invalid(format!("C0026: the configuration is no JSON: {e}")))?;
        self.checkpoint(&session, Position { step: r.step, samples: r.samples, config }).await?;
        Ok(Response::new(self.noted(&session)))
    }

    async fn settle(&self, request: Request<SessionName>) -> Reply<Noted> {
        let session = self.session(request.into_inner().epoch)?;
        self.settle(&session).await?;
        Ok(Response::new(self.noted(&session)))
    }

    async fn restore(&self, request: Request<control::RestoreNewest>) -> Reply<control::Restored> {
        let r = request.into_inner();
        let session = self.session(r.epoch)?;
        self.restore(&session, r.passed).await.map(Response::new)
    }

    async fn memory(&self, request: Request<SessionName>) -> Reply<control::MemoryReply> {
        let r = request.into_inner();
        let session = self.session(r.epoch)?;
        let replies = self
            .everywhere(&session, |mut client, _| async move { client.memory(r).await.map(|m| m.into_inner().devices) })
            .await?;
        Ok(Response::new(control::MemoryReply { devices: replies.into_iter().flatten().collect() }))
    }

    async fn foresee(&self, request: Request<Streaming<control::ForeseePart>>) -> Reply<control::Needs> {
        let (head, program) = foreseen(request.into_inner()).await?;
        let session = self.session(head.epoch)?;
        let parts = wire::foresee(head, &program);
        // What does not fit is no reason to stop.
        let call = |mut client: WorkerClient<Channel>, _| {
            let parts = parts.clone();
            async move { client.foresee(iter(parts)).await.map(|r| r.into_inner().devices) }
        };
        let needs = self.ask(&session, false, call).await?;
        Ok(Response::new(control::Needs { devices: needs.into_iter().flatten().collect() }))
    }

    type EventsStream = Sent<control::DeviceEvents>;

    async fn events(&self, request: Request<control::EventsRequest>) -> Reply<Sent<control::DeviceEvents>> {
        let begun = now_ns();
        let session = self.session(request.into_inner().epoch)?;
        let mut parts = self.gather_events(&session, EVENTS_WITHIN).await;
        // The caller takes it for the middle of its call.
        let now = begun + (now_ns() - begun) / 2;
        parts.iter_mut().for_each(|p| p.now_ns = now);
        Ok(Response::new(Box::pin(iter(parts.into_iter().map(Ok)))))
    }

    type ProfileStream = Sent<control::DeviceProfile>;

    async fn profile(&self, request: Request<SessionName>) -> Reply<Sent<control::DeviceProfile>> {
        let r = request.into_inner();
        let session = self.session(r.epoch)?;
        // All at once: devices share what they have while they are measured, as they do in a step.
        let profiles = self.everywhere(&session, |mut client, place| {
            let own = session.crew[place].1.clone();
            async move {
                let stream = client.profile(r).await?.into_inner();
                // A message each, whatever a worker sends.
                let mut devices: Vec<_> = stream.take(own.len()).collect::<Result<_, Status>>().await?;
                devices.retain(|d: &control::DeviceProfile| own.contains(&d.device));
                Ok(devices)
            }
        });
        Ok(Response::new(Box::pin(iter(profiles.await?.into_iter().flatten().map(Ok)))))
    }

    async fn status(&self, _: Request<control::StatusRequest>) -> Reply<StatusReply> {
        Ok(Response::new(self.snapshot()))
    }

    type WatchStream = Sent<StatusReply>;

    async fn watch(&self, _: Request<control::StatusRequest>) -> Reply<Sent<StatusReply>> {
        let (this, mut changes) = (self.clone(), self.watched());
        let (send, receive) = mpsc::channel(1);
        tokio::spawn(async move {
            while send.send(Ok(this.snapshot())).await.is_ok() && changes.changed().await.is_ok() {
                tokio::time::sleep(WATCH).await;
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receive))))
    }

    async fn drain(&self, request: Request<control::DrainRequest>) -> Reply<Done> {
        let r = request.into_inner();
        Coordinator::drain(self, r.worker, &r.reason)?;
        Ok(Response::new(Done {}))
    }
}

impl Coordinator {
    /// A result of a function or a variable, whole.
    async fn gather(&self, session: &Arc<Active>, name: &ArrayName) -> Result<Array, Status> {
        let ty = session.parts(name)?[0].ty.clone();
        let pieces = self
            .everywhere(session, |mut client, _| {
                let name = name.clone();
                async move {
                    let mut stream = client.fetch(name).await?.into_inner();
                    let (mut assembler, mut found) = (Assembler::default(), Vec::new());
                    while let Some(part) = stream.next().await {
                        found.extend(assembler.take(part?).map_err(invalid)?);
                    }
                    assembler.end().map_err(invalid)?;
                    Ok(found)
                }
            })
            .await?;
        let mut whole = Array::zeros(ty.dtype, &ty.shape());
        for (head, array) in pieces.into_iter().flatten() {
            let start: Vec<usize> = head.start.iter().map(|s| *s as usize).collect();
            if !whole.put(&start, &array) {
                return Err(Status::internal(format!("C0019: a part of `{}` does not fit", name.name)));
            }
        }
        Ok(whole)
    }
}
