//! Who may call what: every method of every server, by everyone who may not, changes nothing.

use coordinator::certs::{Authority, Issued};
use coordinator::launch::Launched;
use coordinator::server::{Coordinator, ServerOptions};
use coordinator::{Options, Session};
use mesh::dim::dim;
use mesh::program::{Init, Program, ProgramBuilder};
use prost_reflect::bytes::{Buf, BufMut, Bytes};
use prost_reflect::prost::Message;
use prost_reflect::{
    DescriptorPool, DynamicMessage, FieldDescriptor, Kind, MessageDescriptor, MethodDescriptor, Value,
};
use proto::control::control_client::ControlClient;
use proto::control::{SessionName, StatusReply, StatusRequest, worker_client::WorkerClient};
use std::collections::BTreeSet;
use std::io::Write;
use std::sync::{Arc, Mutex, OnceLock, mpsc};
use std::time::{Duration, SystemTime};
use tokio::runtime::Runtime;
use tokio_stream::iter;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};
use tonic::{Code, Status};
use tonic_health::pb::health_client::HealthClient;
use tonic_reflection::pb::v1 as reflection;
use worker::access::{METHODS, allowed};
use worker::node::{self, NodeOptions};
use worker::service::Offer;
use worker::tls::{Role, Tls};
use worker::transport::connector;

/// Methods that are no part of an epoch, and why. All others refuse one that has passed.
const OUTSIDE_EPOCHS: &[(&str, &str)] = &[
    ("/mesh.control.v1.Membership/Join", "a worker comes before an epoch, and tells only the last that it has seen"),
    ("/mesh.control.v1.Control/Open", "it begins an epoch"),
    ("/mesh.control.v1.Control/Status", "it tells the epoch"),
    ("/mesh.control.v1.Control/Watch", "it tells the epoch"),
    ("/mesh.control.v1.Control/Drain", "an operator's, in any epoch; it names a worker"),
    ("/grpc.health.v1.Health/Check", "any client's"),
    ("/grpc.health.v1.Health/Watch", "any client's"),
    ("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", "any client's"),
];

fn runtime() -> &'static Runtime {
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    RUNTIME.get_or_init(|| tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap())
}

/// Where the servers let checkpoints lie.
fn store() -> &'static str {
    static STORE: OnceLock<tempfile::TempDir> = OnceLock::new();
    STORE.get_or_init(|| tempfile::tempdir().unwrap()).path().to_str().unwrap()
}

/// What the servers log.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Log {
    /// That of this test's process.
    fn begin() -> Log {
        static LOG: OnceLock<Log> = OnceLock::new();
        let begin = || {
            let log = Log::default();
            let writer = log.clone();
            tracing_subscriber::fmt().with_ansi(false).with_writer(move || writer.clone()).init();
            log
        };
        LOG.get_or_init(begin).clone()
    }

    fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }
}

/// A coordinator and a worker with TLS, on loopback.
struct Cluster {
    authority: Authority,
    coordinator: String,
    worker: String,
    data: String,
}

impl Cluster {
    fn start() -> Cluster {
        let authority = Authority::new().unwrap();
        let tls = |role: Role| authority.tls(role, &authority.issue_for(role, "test", 1).unwrap()).unwrap();
        let coordinator = serve(tls(Role::Coordinator));
        let (told, bound) = mpsc::channel();
        let options = NodeOptions {
            join: coordinator.clone(),
            bind: ([127, 0, 0, 1], 0).into(),
            advertise: None,
            offer: Offer { devices: 1, threads: 1, memory: None },
            insecure: false,
            tls: Some(tls(Role::Worker)),
            store: store().into(),
            grace: Duration::from_secs(1),
        };
        std::thread::spawn(move || node::run_telling(&options, |hello| told.send(hello.clone()).unwrap()));
        let hello = bound.recv_timeout(Duration::from_secs(10)).unwrap();
        Cluster { authority, coordinator, worker: hello.address, data: hello.data_address }
    }

    fn issue(&self, role: Role) -> Issued {
        self.authority.issue_for(role, "caller", 1).unwrap()
    }

    fn session(&self) -> Session {
        let tls = self.authority.tls(Role::Client, &self.issue(Role::Client)).unwrap();
        Session::connect(&self.coordinator, program(), &Options { tls: Some(tls), ..Options::default() }).unwrap()
    }

    /// A channel that trusts the authority, with that certificate or none.
    fn channel(&self, address: &str, callee: Role, own: Option<&Issued>) -> Channel {
        let ca = Certificate::from_pem(self.authority.pem());
        let mut tls = ClientTlsConfig::new().ca_certificate(ca).domain_name(callee.domain());
        if let Some(own) = own {
            tls = tls.identity(Identity::from_pem(&own.certificate, &own.key));
        }
        let _inside = runtime().enter();
        Endpoint::from_shared(format!("https://{address}")).unwrap().tls_config(tls).unwrap().connect_lazy()
    }

    fn status(&self) -> StatusReply {
        let channel = self.channel(&self.coordinator, Role::Coordinator, Some(&self.issue(Role::Observer)));
        let reply = runtime().block_on(ControlClient::new(channel).status(StatusRequest {}));
        let mut status = reply.unwrap().into_inner();
        status.workers.iter_mut().for_each(|w| w.silent_ms = 0);
        status
    }

    /// Whether the worker is in that epoch with a program loaded.
    fn worker_is_in(&self, epoch: u64) -> bool {
        let channel = self.channel(&self.worker, Role::Worker, Some(&self.issue(Role::Coordinator)));
        runtime().block_on(WorkerClient::new(channel).memory(SessionName { epoch })).is_ok()
    }

    /// The servers that have a method, with their roles.
    fn servers(&self, method: &str) -> Vec<(&str, Role)> {
        let (coordinator, worker) = ((&*self.coordinator, Role::Coordinator), (&*self.worker, Role::Worker));
        match method.split('/').nth(1).unwrap() {
            "mesh.control.v1.Control" | "mesh.control.v1.Membership" => vec![coordinator],
            "mesh.control.v1.Worker" => vec![worker],
            "mesh.data.v1.DataPlane" => vec![(&*self.data, Role::Worker)],
            _ => vec![coordinator, worker],
        }
    }
}

/// A coordinator with those certificates; its address.
fn serve(tls: Tls) -> String {
    let socket = runtime().block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
    let address = socket.local_addr().unwrap().to_string();
    let lease = Duration::from_secs(1);
    let options = ServerOptions { tls: Some(tls), lease, store: store().into(), ..ServerOptions::default() };
    runtime().spawn(Coordinator::new(options).unwrap().serve(socket));
    address
}

/// A variable `w` of one number, to which `train` adds 1.
fn program() -> Program {
    let mut p = ProgramBuilder::new();
    p.function("train", |g| {
        let w = g.variable("w", &[dim("n", 1)], Init::ones());
        g.assign(&w, &(&w + 1.0));
    })
    .unwrap();
    p.finish().unwrap()
}

/// Messages as they are on the wire.
#[derive(Clone, Default)]
struct Raw;

impl Codec for Raw {
    type Encode = Vec<u8>;
    type Decode = Vec<u8>;
    type Encoder = Raw;
    type Decoder = Raw;
    fn encoder(&mut self) -> Raw {
        Raw
    }
    fn decoder(&mut self) -> Raw {
        Raw
    }
}

impl Encoder for Raw {
    type Item = Vec<u8>;
    type Error = Status;
    fn encode(&mut self, item: Vec<u8>, to: &mut EncodeBuf<'_>) -> Result<(), Status> {
        to.put_slice(&item);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Vec<u8>;
    type Error = Status;
    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<Vec<u8>>, Status> {
        Ok(Some(from.copy_to_bytes(from.remaining()).to_vec()))
    }
}

/// Calls any method with any messages; what it answers first.
fn call(channel: Channel, method: &str, messages: Vec<Vec<u8>>) -> Result<Vec<u8>, Status> {
    let path = method.parse().unwrap();
    let call = async {
        let mut grpc = tonic::client::Grpc::new(channel);
        grpc.ready().await.map_err(|e| Status::from_error(Box::new(e)))?;
        let mut reply = grpc.streaming(tonic::Request::new(iter(messages)), path, Raw).await?.into_inner();
        Ok(reply.message().await?.unwrap_or_default())
    };
    let timed = async { tokio::time::timeout(Duration::from_secs(5), call).await };
    runtime().block_on(timed).unwrap_or_else(|_| panic!("{method} is not answered"))
}

/// Every method of the schema, and of the services beside it.
fn methods() -> Vec<(String, MethodDescriptor)> {
    let mut pool = DescriptorPool::decode(proto::SCHEMA).unwrap();
    pool.decode_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET).unwrap();
    pool.decode_file_descriptor_set(reflection::FILE_DESCRIPTOR_SET).unwrap();
    let path = |m: &MethodDescriptor| format!("/{}/{}", m.parent_service().full_name(), m.name());
    pool.services().flat_map(|s| s.methods().collect::<Vec<_>>()).map(|m| (path(&m), m)).collect()
}

/// Messages that would have an effect in that epoch: one for each case of a oneof, in order.
fn messages(of: &MessageDescriptor, epoch: u64) -> Vec<Vec<u8>> {
    let cases: Vec<FieldDescriptor> = of.oneofs().flat_map(|o| o.fields().collect::<Vec<_>>()).collect();
    let message = |case: Option<&FieldDescriptor>| {
        let mut m = filled(of, epoch);
        if let Some(field) = case {
            m.set_field(field, value(field, epoch));
        }
        m.encode_to_vec()
    };
    if cases.is_empty() { vec![message(None)] } else { cases.iter().map(|c| message(Some(c))).collect() }
}

fn filled(of: &MessageDescriptor, epoch: u64) -> DynamicMessage {
    let mut message = DynamicMessage::new(of.clone());
    for field in of.fields().filter(|f| f.containing_oneof().is_none()) {
        message.set_field(&field, value(&field, epoch));
    }
    message
}

fn value(field: &FieldDescriptor, epoch: u64) -> Value {
    let text = |s: &str| Value::String(s.into());
    match (field.name(), field.kind()) {
        ("epoch", _) => Value::U64(epoch),
        ("protocol", _) if field.parent_message().name() == "Hello" => Value::U32(connector::PROTOCOL),
        ("protocol", _) => Value::U32(node::PROTOCOL),
        ("build", _) => text(&connector::Version::default().build),
        ("job", _) => text("session"),
        ("worker", _) => Value::U64(1),
        ("devices", Kind::Uint32) => Value::U32(1),
        ("checkpoints", _) => text(&format!("{}/run", store())),
        ("folder", _) => text("step-00000001"),
        ("mesh", _) => text("1"),
        ("transport", _) => text("auto"),
        ("function", _) if field.parent_message().name() == "StepRequest" => text("train"),
        ("name", Kind::String) => text("w"),
        ("shape", _) => Value::List(vec![Value::U64(1)]),
        ("start", _) => Value::List(vec![Value::U64(0)]),
        (_, Kind::Bytes) => Value::Bytes(Bytes::from_static(&[0; 4])),
        (_, Kind::Enum(_)) => Value::EnumNumber(1),
        (_, Kind::Message(of)) if !field.is_list() && !field.is_map() => Value::Message(filled(&of, epoch)),
        _ => Value::default_value_for_field(field),
    }
}

/// Whether an epoch is anywhere in a message.
fn has_epoch(of: &MessageDescriptor) -> bool {
    of.fields().any(|f| f.name() == "epoch" || matches!(f.kind(), Kind::Message(m) if m != *of && has_epoch(&m)))
}

#[test]
fn every_method_of_the_schema_is_in_the_table() {
    let missing: Vec<String> = methods().into_iter().map(|(path, _)| path).filter(|p| allowed(p).is_none()).collect();
    assert!(missing.is_empty(), "say in worker/src/access.rs who may call {missing:?}");
    let names: BTreeSet<&str> = METHODS.iter().map(|(m, _)| *m).collect();
    assert_eq!(names.len(), METHODS.len(), "a method is there twice");
    assert!(METHODS.iter().all(|(_, roles)| !roles.is_empty()));
}

#[test]
fn whoever_may_not_call_a_method_is_refused_and_changes_nothing() {
    let log = Log::begin();
    let cluster = Cluster::start();
    drop(cluster.session());
    // The session before must be closed: another one is refused until then.
    while !cluster.status().session.is_empty() {
        std::thread::sleep(Duration::from_millis(10));
    }
    let mut session = cluster.session();
    let train = session.function("train").unwrap();
    session.step(train, 0).unwrap();
    let before = cluster.status();
    let (epoch, hash) = (before.epoch, session.variables_hash().unwrap());
    assert!(epoch > 2 && before.workers.len() == 1 && before.steps > 0, "{before:?}");

    let other = Authority::new().unwrap();
    let (now, day) = (SystemTime::now(), Duration::from_secs(86400));
    let calls = std::cell::Cell::new(0);
    let refused = |method: &str, reply: Result<Vec<u8>, Status>, whom: &str, good: &dyn Fn(&Status) -> bool| {
        match reply {
            Ok(_) => panic!("{method} answers {whom}"),
            Err(status) => assert!(good(&status), "{method} to {whom}: {status:?}"),
        }
        assert_eq!(cluster.status(), before, "{method} by {whom} changed something");
        assert!(cluster.worker_is_in(epoch), "{method} by {whom} changed the worker");
        calls.set(calls.get() + 1);
    };
    let listed: BTreeSet<&str> = OUTSIDE_EPOCHS.iter().map(|(m, _)| *m).collect();
    let mut outside = BTreeSet::new();
    for (method, descriptor) in methods() {
        let now_messages = messages(&descriptor.input(), epoch);
        let roles = allowed(&method).unwrap();
        for (address, callee) in cluster.servers(&method) {
            let calling = |own: Option<&Issued>, messages: &[Vec<u8>]| {
                call(cluster.channel(address, callee, own), &method, messages.to_vec())
            };
            // Refused by TLS: the connection is closed, and no message is read.
            let no_tls = |s: &Status| {
                let closed = std::error::Error::source(s).is_some_and(|e| e.is::<tonic::transport::Error>());
                s.code() != Code::PermissionDenied && closed
            };
            refused(&method, calling(None, &now_messages), "one without a certificate", &no_tls);
            let stranger = other.issue_for(roles[0], "stranger", 1).unwrap();
            refused(&method, calling(Some(&stranger), &now_messages), "one of another authority", &no_tls);
            let late = cluster.authority.issue(roles[0], "late", now - 2 * day, now - day).unwrap();
            refused(&method, calling(Some(&late), &now_messages), "one whose certificate has expired", &no_tls);
            for role in Role::ALL.into_iter().filter(|r| !roles.contains(r)) {
                let reply = calling(Some(&cluster.issue(role)), &now_messages);
                let denied = |s: &Status| s.code() == Code::PermissionDenied && s.message().starts_with("W0054: ");
                refused(&method, reply, &format!("a {role}"), &denied);
                let line = format!("who={role} caller at 127.0.0.1:");
                let audited = log.text().lines().any(|l| l.contains(&line) && l.contains(&format!("method={method}")));
                assert!(audited, "{method} by a {role} is not logged:\n{}", log.text());
            }
            if listed.contains(&*method) {
                outside.insert(method.clone());
            } else {
                assert!(
                    has_epoch(&descriptor.input()),
                    "{method} has no epoch; give it one, or say why not in the list"
                );
                let reply = calling(Some(&cluster.issue(roles[0])), &messages(&descriptor.input(), epoch - 1));
                let stale = |s: &Status| s.code() == Code::FailedPrecondition && s.message().contains("epoch");
                refused(&method, reply, "one of an epoch that has passed", &stale);
            }
        }
    }
    assert_eq!(outside.len(), listed.len(), "the list names a method that there is not");
    assert!(calls.get() > 100, "{} calls", calls.get());
    // docs/security.md shows such a line.
    let shown = include_str!("../../docs/security.md").lines().find(|l| l.starts_with("WARN audit: ")).unwrap();
    let (_, refusal) = shown.split_once(" at 10.0.0.7:4312 ").unwrap();
    let begins = "WARN audit: refused who=worker caller at 127.0.0.1:";
    let logged = log.text().lines().any(|l| l.contains(begins) && l.ends_with(refusal));
    assert!(logged && shown.starts_with("WARN audit: refused who=worker node-7 at "), "{shown}");

    // What is in no table is nobody's.
    for role in Role::ALL {
        let channel = cluster.channel(&cluster.coordinator, Role::Coordinator, Some(&cluster.issue(role)));
        let reply = call(channel, "/mesh.control.v1.Control/Shutdown", vec![vec![]]);
        let denied = |s: &Status| s.code() == Code::PermissionDenied && s.message().starts_with("W0053: ");
        refused("Shutdown", reply, &format!("a {role}"), &denied);
    }
    assert_eq!(std::fs::read_dir(store()).unwrap().count(), 0, "something was written");
    // After all that the session goes on from where it was.
    assert_eq!(session.variables_hash().unwrap(), hash);
    session.step(train, 1).unwrap();
    assert_eq!(cluster.status().steps, before.steps + 1);
}

#[test]
fn a_worker_cannot_pose_as_the_coordinator_and_a_coordinator_without_tls_is_noticed() {
    let authority = Authority::new().unwrap();
    let tls = |role: Role| authority.tls(role, &authority.issue_for(role, "test", 1).unwrap()).unwrap();
    let connect =
        |url: &str, tls: Option<Tls>| match Session::connect(url, program(), &Options { tls, ..Options::default() }) {
            Ok(_) => panic!("it connects"),
            Err(e) => e.to_string(),
        };
    let false_one = serve(tls(Role::Worker));
    let e = connect(&false_one, Some(tls(Role::Client)));
    assert!(e.starts_with("C0035: ") && e.contains("its certificate is not good"), "{e}");
    let e = connect(&format!("http://{false_one}"), Some(tls(Role::Client)));
    assert!(e.starts_with("W0075: ") && e.contains("means no encryption, but --tls is given"), "{e}");

    let socket = runtime().block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
    let plain = socket.local_addr().unwrap().to_string();
    runtime().spawn(Coordinator::new(ServerOptions::default()).unwrap().serve(socket));
    let e = connect(&plain, Some(tls(Role::Client)));
    assert!(e.contains("does not speak TLS"), "{e}");
    // Without TLS there are no roles, and still nothing beside the table.
    let channel = {
        let _inside = runtime().enter();
        Endpoint::from_shared(format!("http://{plain}")).unwrap().connect_lazy()
    };
    assert!(call(channel.clone(), "/mesh.control.v1.Control/Status", vec![vec![]]).is_ok());
    let e = call(channel, "/mesh.control.v1.Control/Shutdown", vec![vec![]]).unwrap_err();
    assert_eq!((e.code(), &e.message()[..5]), (Code::PermissionDenied, "W0053"));
}

#[test]
fn a_coordinator_that_a_model_program_starts_lets_nobody_else_in() {
    let launched = Launched::start(0, ".", |_| unreachable!("no workers")).unwrap();
    let status = |own: Option<&Tls>| {
        let address = launched.url.strip_prefix("https://").unwrap();
        let _inside = runtime().enter();
        let channel = node::endpoint(address, own, Role::Coordinator).unwrap().connect_lazy();
        runtime().block_on(ControlClient::new(channel).status(StatusRequest {}))
    };
    assert!(status(Some(&launched.tls)).is_ok());
    assert!(status(None).is_err());
    let other = Authority::new().unwrap();
    let other = other.tls(Role::Client, &other.issue_for(Role::Client, "launched", 1).unwrap()).unwrap();
    assert!(status(Some(&other)).is_err());
}

#[test]
fn coordinator_and_worker_tell_their_health_and_their_schema() {
    let cluster = Cluster::start();
    for (address, callee, service) in [
        (&cluster.coordinator, Role::Coordinator, "mesh.control.v1.Control"),
        (&cluster.worker, Role::Worker, "mesh.control.v1.Worker"),
    ] {
        for role in Role::ALL {
            let channel = cluster.channel(address, callee, Some(&cluster.issue(role)));
            let request = tonic_health::pb::HealthCheckRequest { service: service.into() };
            let reply = runtime().block_on(HealthClient::new(channel).check(request)).unwrap();
            assert_eq!(reply.into_inner().status, 1, "{service} serves");
        }
        let channel = cluster.channel(address, callee, Some(&cluster.issue(Role::Observer)));
        let list = reflection::server_reflection_request::MessageRequest::ListServices(String::new());
        let request = reflection::ServerReflectionRequest { host: String::new(), message_request: Some(list) };
        let reply = runtime().block_on(async {
            let mut client = reflection::server_reflection_client::ServerReflectionClient::new(channel);
            let mut stream = client.server_reflection_info(iter([request])).await.unwrap().into_inner();
            stream.message().await.unwrap().unwrap()
        });
        let Some(reflection::server_reflection_response::MessageResponse::ListServicesResponse(list)) =
            reply.message_response
        else {
            panic!("no list of services");
        };
        let names: Vec<String> = list.service.into_iter().map(|s| s.name).collect();
        assert!(names.iter().any(|n| n == service) && names.iter().any(|n| n == "grpc.health.v1.Health"), "{names:?}");
    }
}
