//! The link between hosts: one gRPC stream a pair of devices.
//!
//! The runtime's tasks encode and decode frames; the device's thread hands over where a message's bytes lie, and copies
//! received bytes to where they belong. Bytes of large messages are lent to the encoder and not copied before. Each side
//! says in its hello how many bytes it is ready to hold before its device has taken them, and gives credit as the device
//! takes them: a sender never outruns a receiver, frames that end the stream are never stuck behind data, and the
//! tasks that read never wait. (tonic allocates a buffer a frame; nothing else is allocated while a step runs.)

use super::TransportError;
use super::bell::Bell;
use super::connector::Version;
use super::link::Link;
use super::lobby::{Arrival, Caller, Lobby};
use crate::access;
use crate::tls::{Role, Tls, causes};
use bytes::{Bytes, BytesMut};
use proto::data::data_plane_client::DataPlaneClient;
use proto::data::data_plane_server::{DataPlane, DataPlaneServer};
use proto::data::frame::Kind;
use proto::data::{Abort, End, Frame, Hello};
use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;
use tokio::sync::{Notify, oneshot};
use tokio_stream::{Stream, StreamExt};
use tonic::transport::Endpoint;
use tonic::transport::server::TcpIncoming;
use tonic::{Code, Request, Response, Status, Streaming};

/// Bytes of a data frame.
pub const CHUNK: usize = 1 << 20;
/// The longest message that is decoded.
const LONGEST: usize = CHUNK + (64 << 10);
/// HTTP/2 windows of a stream and a connection, and the longest HTTP/2 frame. Measured: larger ones gain nothing here.
const STREAM_WINDOW: u32 = 4 << 20;
const CONNECTION_WINDOW: u32 = 8 << 20;
const HTTP2_FRAME: u32 = 1 << 20;
/// Bytes that a device's link holds before the device has taken them.
pub const WINDOW: u64 = 8 << 20;
/// Credit is given when so many bytes have been taken: a sender has three quarters of the window left.
const CREDIT: u64 = WINDOW / 4;
/// What is shorter is copied into a frame with its neighbours instead of lent.
const SMALL: usize = 64 << 10;
/// How long a closed link still takes what the peer sends, so that the peer gets what was sent to it.
const LINGER: Duration = Duration::from_secs(2);
const KEEP_ALIVE: Duration = Duration::from_secs(10);
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(20);
/// How long a caller may take to say hello.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);
const RETRY: Duration = Duration::from_millis(50);

/// What a device's thread and the runtime's tasks share about a link.
struct Pipe {
    bell: Arc<Bell>,
    out: Mutex<Out>,
    into: Mutex<Into>,
    /// Messages that lie in the device's memory, of which the encoder may still look at so many bytes.
    lent: Mutex<Lent>,
    /// The device has let go of the link.
    closing: Notify,
}

/// The way to the peer.
struct Out {
    hello: Option<Hello>,
    queue: VecDeque<Part>,
    /// Bytes that the peer is ready to take.
    window: u64,
    /// Credit to give.
    credit: u64,
    abort: Option<Abort>,
    /// To say once what is queued is out: that nothing more comes.
    end: Option<End>,
    /// To say: that the peer's end has arrived.
    arrived: Option<End>,
    /// Nobody reads the peer's frames any more, and nothing more is said.
    over: bool,
    waker: Option<Waker>,
}

/// The way from the peer.
struct Into {
    queue: VecDeque<Bytes>,
    /// Bytes for which the peer has not been given credit yet.
    held: u64,
    end: Option<Ending>,
    /// Our own end has arrived, or never will.
    arrived: bool,
}

/// How the peer ended.
enum Ending {
    Aborted(usize, String),
    Lost(String),
    Corrupt(String),
}

/// Messages of which bytes are lent to the encoder, in order.
struct Lent {
    /// The number of the first one.
    first: u64,
    /// By message: bytes that it may still look at.
    bytes: VecDeque<usize>,
}

impl Lent {
    /// The number of the next message.
    fn next(&self) -> u64 {
        self.first + self.bytes.len() as u64
    }
}

/// Bytes that go out.
enum Part {
    Own(Bytes),
    /// Bytes of the device's memory, counted in [`Pipe::lent`] for the message of that number.
    Lent(*const u8, usize, u64),
}

// SAFETY: lent bytes stay readable until they are given back, whichever thread reads them.
unsafe impl Send for Part {}

impl Part {
    /// Takes off the first `room` bytes, or all.
    fn split(&mut self, room: usize, pipe: &Arc<Pipe>) -> Bytes {
        match self {
            Part::Own(bytes) => bytes.split_to(room.min(bytes.len())),
            Part::Lent(at, bytes, message) => {
                let n = room.min(*bytes);
                let loan = Loan { at: *at, bytes: n, message: *message, pipe: pipe.clone() };
                // SAFETY: not beyond the end of the lent bytes.
                *at = unsafe { at.add(n) };
                *bytes -= n;
                Bytes::from_owner(loan)
            }
        }
    }

    fn is_empty(&self) -> bool {
        match self {
            Part::Own(bytes) => bytes.is_empty(),
            Part::Lent(_, bytes, _) => *bytes == 0,
        }
    }
}

/// A part of the lent bytes, which gives them back when it is dropped.
struct Loan {
    at: *const u8,
    bytes: usize,
    message: u64,
    pipe: Arc<Pipe>,
}

// SAFETY: as for `Part`.
unsafe impl Send for Loan {}

impl AsRef<[u8]> for Loan {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: the bytes stay readable and unchanged until they are given back (contract of `Link::write`).
        unsafe { std::slice::from_raw_parts(self.at, self.bytes) }
    }
}

impl Drop for Loan {
    fn drop(&mut self) {
        self.pipe.give_back(self.message, self.bytes);
    }
}

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

fn frame(kind: Kind) -> Frame {
    Frame { kind: Some(kind) }
}

impl Pipe {
    fn new(hello: Hello, window: u64, bell: Arc<Bell>) -> Arc<Pipe> {
        let out = Out {
            hello: Some(hello),
            queue: VecDeque::with_capacity(64),
            window,
            credit: 0,
            abort: None,
            end: None,
            arrived: None,
            over: false,
            waker: None,
        };
        Arc::new(Pipe {
            bell,
            out: Mutex::new(out),
            into: Mutex::new(Into { queue: VecDeque::with_capacity(64), held: 0, end: None, arrived: false }),
            lent: Mutex::new(Lent { first: 0, bytes: VecDeque::with_capacity(64) }),
            closing: Notify::new(),
        })
    }

    fn give_back(&self, message: u64, bytes: usize) {
        let mut lent = lock(&self.lent);
        let at = (message - lent.first) as usize;
        lent.bytes[at] -= bytes;
        let settled = lent.bytes[at] == 0;
        while lent.bytes.front() == Some(&0) {
            lent.bytes.pop_front();
            lent.first += 1;
        }
        drop(lent);
        if settled {
            self.bell.ring();
        }
    }

    /// Changes what goes out, and has the encoder look.
    fn change(&self, f: impl FnOnce(&mut Out)) {
        let mut out = lock(&self.out);
        f(&mut out);
        let waker = out.waker.take();
        drop(out);
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Takes a frame off the stream; false at the end.
    fn receive(&self, received: Result<Option<Frame>, Status>) -> bool {
        let end = match received {
            Ok(Some(Frame { kind: Some(Kind::Data(data)) })) => {
                let mut into = lock(&self.into);
                into.held += data.len() as u64;
                if data.is_empty() || data.len() > CHUNK || into.held > WINDOW {
                    drop(into);
                    Ending::Corrupt(format!("a frame of {} bytes beyond the rules", data.len()))
                } else {
                    into.queue.push_back(data);
                    drop(into);
                    self.bell.ring();
                    return true;
                }
            }
            Ok(Some(Frame { kind: Some(Kind::Credit(bytes)) })) => {
                let mut good = false;
                self.change(|out| {
                    out.window = out.window.saturating_add(bytes);
                    good = out.window <= i64::MAX as u64;
                });
                if good {
                    return true;
                }
                Ending::Corrupt("credit beyond all bounds".into())
            }
            Ok(Some(Frame { kind: Some(Kind::Abort(abort)) })) => Ending::Aborted(abort.device as usize, abort.reason),
            Ok(Some(Frame { kind: Some(Kind::End(End { arrived })) })) => {
                let mut into = lock(&self.into);
                if arrived {
                    into.arrived = true;
                } else {
                    into.end.get_or_insert_with(|| Ending::Lost("it has closed the connection".into()));
                    drop(into);
                    self.change(|out| out.arrived = Some(End { arrived: true }));
                }
                self.bell.ring();
                return true;
            }
            Ok(Some(Frame { kind: Some(Kind::Hello(_)) })) => Ending::Corrupt("a second hello".into()),
            Ok(Some(Frame { kind: None })) => Ending::Corrupt("a frame of an unknown kind".into()),
            Ok(None) => Ending::Lost("its stream ended".into()),
            Err(status) => Ending::Lost(format!("the stream broke: {}", status.message())),
        };
        lock(&self.into).end.get_or_insert(end);
        self.bell.ring();
        false
    }

    /// Takes frames until the stream ends, or the device has let go of the link and the peer has had its time.
    async fn receive_all(self: Arc<Pipe>, mut frames: Streaming<Frame>) {
        let closed = async {
            self.closing.notified().await;
            tokio::time::sleep(LINGER).await;
        };
        let mut closed = std::pin::pin!(closed);
        loop {
            tokio::select! {
                received = frames.message() => if !self.receive(received) { break },
                () = &mut closed => break,
            }
        }
        lock(&self.into).arrived = true;
        self.change(|out| out.over = true);
        self.bell.ring();
    }
}

/// The frames that go out, as the encoder asks for them.
pub struct Frames(Arc<Pipe>);

impl Stream for Frames {
    type Item = Frame;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Frame>> {
        let out = &mut *lock(&self.0.out);
        if let Some(hello) = out.hello.take() {
            return Poll::Ready(Some(frame(Kind::Hello(hello))));
        }
        if let Some(abort) = out.abort.take() {
            return Poll::Ready(Some(frame(Kind::Abort(abort))));
        }
        if let Some(end) = out.arrived.take() {
            return Poll::Ready(Some(frame(Kind::End(end))));
        }
        if out.credit >= CREDIT {
            let credit = std::mem::take(&mut out.credit);
            return Poll::Ready(Some(frame(Kind::Credit(credit))));
        }
        let room = usize::try_from(out.window).unwrap_or(usize::MAX).min(CHUNK);
        let data = match out.queue.front_mut() {
            Some(part) if room > 0 => part.split(room, &self.0),
            None if out.end.is_some() => return Poll::Ready(out.end.take().map(|e| frame(Kind::End(e)))),
            _ if out.over => return Poll::Ready(None),
            _ => {
                out.waker = Some(cx.waker().clone());
                return Poll::Pending;
            }
        };
        out.window -= data.len() as u64;
        if out.queue.front().is_some_and(Part::is_empty) {
            out.queue.pop_front();
        }
        Poll::Ready(Some(frame(Kind::Data(data))))
    }
}

/// What a server answers with.
pub type Answers = tokio_stream::adapters::Map<Frames, fn(Frame) -> Result<Frame, Status>>;

/// One device's end of a stream.
pub struct GrpcLink {
    me: usize,
    peer: usize,
    pipe: Arc<Pipe>,
    closed: bool,
    /// Small writes, which go out as one frame.
    small: BytesMut,
    /// Bytes taken for which no credit has been given yet.
    taken: u64,
    /// The message that is being written, if it is lent to the encoder.
    written: Option<u64>,
}

impl GrpcLink {
    fn push_small(&mut self) {
        if !self.small.is_empty() {
            let bytes = self.small.split().freeze();
            self.pipe.change(|out| out.queue.push_back(Part::Own(bytes)));
        }
    }

    /// Whether nothing of the device's memory is looked at any more.
    fn free(&self) -> bool {
        lock(&self.pipe.lent).bytes.is_empty()
    }

    /// Forgets what has not gone out yet.
    fn clear(&mut self) {
        let queue = std::mem::take(&mut lock(&self.pipe.out).queue);
        for part in queue {
            if let Part::Lent(_, bytes, message) = part {
                self.pipe.give_back(message, bytes);
            }
        }
    }
}

impl Link for GrpcLink {
    fn kind(&self) -> &'static str {
        "gRPC"
    }

    unsafe fn write(&mut self, from: *const u8, bytes: usize) -> Result<usize, TransportError> {
        if bytes < SMALL {
            if self.small.len() + bytes > CHUNK {
                self.push_small();
            }
            // SAFETY: by this function's contract.
            self.small.extend_from_slice(unsafe { std::slice::from_raw_parts(from, bytes) });
        } else {
            self.push_small();
            let message = {
                let mut lent = lock(&self.pipe.lent);
                lent.bytes.push_back(bytes);
                lent.next() - 1
            };
            self.written = Some(message);
            self.pipe.change(|out| out.queue.push_back(Part::Lent(from, bytes, message)));
        }
        Ok(bytes)
    }

    unsafe fn read(&mut self, to: *mut u8, bytes: usize) -> Result<usize, TransportError> {
        let mut done = 0;
        while done < bytes {
            let mut into = lock(&self.pipe.into);
            let Some(front) = into.queue.front_mut() else {
                match &into.end {
                    Some(Ending::Corrupt(what)) if done == 0 => {
                        return Err(TransportError::Corrupt { me: self.me, peer: self.peer, what: what.clone() });
                    }
                    _ => break,
                }
            };
            let part = front.split_to(front.len().min(bytes - done));
            if front.is_empty() {
                into.queue.pop_front();
            }
            drop(into);
            // SAFETY: at most `bytes` in all.
            unsafe { std::ptr::copy_nonoverlapping(part.as_ptr(), to.add(done), part.len()) };
            done += part.len();
        }
        self.taken += done as u64;
        Ok(done)
    }

    fn flush(&mut self) {
        self.push_small();
        if self.taken >= CREDIT {
            let taken = std::mem::take(&mut self.taken);
            lock(&self.pipe.into).held -= taken;
            self.pipe.change(|out| out.credit += taken);
        }
    }

    fn end(&mut self) -> Option<u64> {
        self.written.take()
    }

    fn settled(&self, message: u64) -> bool {
        let lent = lock(&self.pipe.lent);
        message < lent.first || lent.bytes[(message - lent.first) as usize] == 0
    }

    fn release(&mut self) {
        if self.free() {
            return;
        }
        self.clear();
        // What is left is being encoded this moment.
        while !self.free() {
            let seen = self.pipe.bell.rings();
            if !self.free() {
                self.pipe.bell.wait(seen, Duration::ZERO, Duration::from_millis(1));
            }
        }
    }

    fn aborted(&self) -> Option<(usize, String)> {
        match &lock(&self.pipe.into).end {
            Some(Ending::Aborted(device, reason)) => Some((*device, reason.clone())),
            _ => None,
        }
    }

    fn lost(&mut self) -> Option<String> {
        match &lock(&self.pipe.into).end {
            Some(Ending::Lost(detail)) => Some(detail.clone()),
            _ => None,
        }
    }

    fn abort(&mut self, device: usize, reason: &str) {
        self.clear();
        let abort = Abort { device: device as u32, reason: reason.into() };
        self.pipe.change(|out| out.abort = Some(abort));
    }

    fn close(&mut self) -> bool {
        if !self.closed {
            self.closed = true;
            self.push_small();
            self.pipe.change(|out| out.end = Some(End { arrived: false }));
        }
        lock(&self.pipe.into).arrived
    }
}

impl Drop for GrpcLink {
    fn drop(&mut self) {
        self.release();
        self.close();
        self.pipe.closing.notify_one();
    }
}

/// What both ends of a meeting give to a link.
pub(super) struct Ends {
    pub me: usize,
    pub peer: usize,
    pub bell: Arc<Bell>,
}

impl Ends {
    fn link(self, pipe: Arc<Pipe>) -> GrpcLink {
        GrpcLink { me: self.me, peer: self.peer, pipe, closed: false, small: BytesMut::new(), taken: 0, written: None }
    }

    /// Takes a caller in: its link, and what it is answered with.
    pub(super) fn accept(self, hello: Hello, window: u64, frames: Streaming<Frame>) -> (GrpcLink, Answers) {
        let pipe = Pipe::new(hello, window, self.bell.clone());
        tokio::spawn(pipe.clone().receive_all(frames));
        let answers = Frames(pipe.clone()).map((|f| Ok(f)) as fn(Frame) -> Result<Frame, Status>);
        (self.link(pipe), answers)
    }

    /// Calls a peer until it answers or refuses; `check` looks at the hello that it answers with. `note` keeps the
    /// last reason why there is no answer yet.
    pub(super) async fn dial(
        self,
        address: String,
        tls: Option<Tls>,
        hello: Hello,
        check: impl Fn(&Hello) -> Result<(), String>,
        note: impl Fn(String),
    ) -> Result<GrpcLink, String> {
        let scheme = if tls.is_some() { "https" } else { "http" };
        let mut endpoint = Endpoint::from_shared(format!("{scheme}://{address}"))
            .map_err(|e| format!("`{address}` is no address: {e}"))?
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_frame_size(HTTP2_FRAME)
            .http2_keep_alive_interval(KEEP_ALIVE)
            .keep_alive_timeout(KEEP_ALIVE_TIMEOUT)
            .keep_alive_while_idle(true)
            .tcp_nodelay(true)
            .connect_timeout(HELLO_TIMEOUT);
        if let Some(tls) = tls {
            endpoint = endpoint
                .tls_config(tls.client(Role::Worker))
                .map_err(|e| format!("the TLS configuration is wrong: {e}"))?;
        }
        loop {
            let pipe = Pipe::new(hello.clone(), 0, self.bell.clone());
            match call(&endpoint, &pipe).await {
                Ok((answer, frames)) => {
                    check(&answer)?;
                    pipe.change(|out| out.window = answer.window);
                    tokio::spawn(pipe.clone().receive_all(frames));
                    return Ok(self.link(pipe));
                }
                Err(status) if status.code() == Code::FailedPrecondition => return Err(status.message().into()),
                Err(status) => note(status.message().into()),
            }
            tokio::time::sleep(RETRY).await;
        }
    }
}

/// Calls once.
async fn call(endpoint: &Endpoint, pipe: &Arc<Pipe>) -> Result<(Hello, Streaming<Frame>), Status> {
    let channel = endpoint.connect().await.map_err(|e| Status::unavailable(causes(&e)))?;
    let mut client = DataPlaneClient::new(channel).max_decoding_message_size(LONGEST);
    let mut frames = client.connect(Request::new(Frames(pipe.clone()))).await?.into_inner();
    match frames.message().await? {
        Some(Frame { kind: Some(Kind::Hello(hello)) }) => Ok((hello, frames)),
        _ => Err(Status::unavailable("it answered without a hello")),
    }
}

/// The end that is called.
struct Service {
    lobby: Arc<Lobby>,
    version: Version,
}

#[tonic::async_trait]
impl DataPlane for Service {
    type ConnectStream = Answers;

    async fn connect(&self, request: Request<Streaming<Frame>>) -> Result<Response<Answers>, Status> {
        let mut frames = request.into_inner();
        let first = tokio::time::timeout(HELLO_TIMEOUT, frames.message()).await;
        let hello = match first.map_err(|_| Status::deadline_exceeded("no hello came"))?? {
            Some(Frame { kind: Some(Kind::Hello(hello)) }) => hello,
            _ => return Err(Status::invalid_argument("the first frame is no hello")),
        };
        self.version.check(&hello).map_err(Status::failed_precondition)?;
        let (answer, answered) = oneshot::channel();
        self.lobby.enter(Arrival { hello, caller: Caller::Grpc { frames, answer } });
        match answered.await {
            Ok(Ok(answers)) => Ok(Response::new(answers)),
            Ok(Err(reason)) => Err(Status::failed_precondition(reason)),
            Err(_) => Err(Status::unavailable("the listener closes")),
        }
    }
}

/// Serves callers until the task is stopped.
pub(super) async fn serve(
    incoming: TcpIncoming,
    tls: Option<Tls>,
    version: Version,
    lobby: Arc<Lobby>,
) -> Result<(), tonic::transport::Error> {
    let mut server = access::server(tls.as_ref())?
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(HTTP2_FRAME)
        .http2_keepalive_interval(Some(KEEP_ALIVE))
        .http2_keepalive_timeout(Some(KEEP_ALIVE_TIMEOUT));
    let service = DataPlaneServer::new(Service { lobby, version }).max_decoding_message_size(LONGEST);
    server.add_service(service).serve_with_incoming(incoming).await
}
