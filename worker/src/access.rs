//! Who may call what: one table for every method of every server, and the layer that keeps to it.
//!
//! What is not in the table is refused. With TLS the caller's role is read from its verified certificate; without it
//! there are no roles (loopback, or `--insecure`), and a method must only be in the table.

use crate::tls::{Owner, Role, Tls, owner};
use std::fmt;
use std::future::Future;
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll};
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::http::{Extensions, Request, Response};
use tonic::transport::Server;
use tonic::transport::server::{TcpConnectInfo, TlsConnectInfo};
use tower::layer::util::{Identity, Stack};
use tower::{Layer, Service};

/// Drives something, or reads tensors: model programs and operators.
const CLIENT: &[Role] = &[Role::Client];
/// Looks, and changes nothing.
const LOOK: &[Role] = &[Role::Client, Role::Observer];
const COORDINATOR: &[Role] = &[Role::Coordinator];
const WORKER: &[Role] = &[Role::Worker];

/// Every method with the roles that may call it.
pub const METHODS: &[(&str, &[Role])] = &[
    ("/mesh.control.v1.Membership/Join", WORKER),
    ("/mesh.control.v1.Control/Open", CLIENT),
    ("/mesh.control.v1.Control/Feed", CLIENT),
    ("/mesh.control.v1.Control/Step", CLIENT),
    ("/mesh.control.v1.Control/Fetch", CLIENT),
    ("/mesh.control.v1.Control/Set", CLIENT),
    ("/mesh.control.v1.Control/Memory", CLIENT),
    ("/mesh.control.v1.Control/Foresee", CLIENT),
    ("/mesh.control.v1.Control/Profile", CLIENT),
    ("/mesh.control.v1.Control/Checkpoint", CLIENT),
    ("/mesh.control.v1.Control/Settle", CLIENT),
    ("/mesh.control.v1.Control/Restore", CLIENT),
    ("/mesh.control.v1.Control/Drain", CLIENT),
    ("/mesh.control.v1.Control/Status", LOOK),
    ("/mesh.control.v1.Control/Events", LOOK),
    ("/mesh.control.v1.Control/Watch", LOOK),
    ("/mesh.control.v1.Worker/Load", COORDINATOR),
    ("/mesh.control.v1.Worker/Feed", COORDINATOR),
    ("/mesh.control.v1.Worker/Run", COORDINATOR),
    ("/mesh.control.v1.Worker/Fetch", COORDINATOR),
    ("/mesh.control.v1.Worker/Set", COORDINATOR),
    ("/mesh.control.v1.Worker/Memory", COORDINATOR),
    ("/mesh.control.v1.Worker/Foresee", COORDINATOR),
    ("/mesh.control.v1.Worker/Profile", COORDINATOR),
    ("/mesh.control.v1.Worker/Copy", COORDINATOR),
    ("/mesh.control.v1.Worker/Write", COORDINATOR),
    ("/mesh.control.v1.Worker/Restore", COORDINATOR),
    ("/mesh.control.v1.Worker/Events", COORDINATOR),
    ("/mesh.control.v1.Worker/Abort", COORDINATOR),
    ("/mesh.data.v1.DataPlane/Connect", WORKER),
    ("/grpc.health.v1.Health/Check", &Role::ALL),
    ("/grpc.health.v1.Health/Watch", &Role::ALL),
    ("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", LOOK),
];

/// The roles that may call a method; None if it is not in the table.
pub fn allowed(method: &str) -> Option<&'static [Role]> {
    METHODS.iter().find(|(m, _)| *m == method).map(|(_, roles)| *roles)
}

/// A server on which every call passes the table; callers need a certificate where there is TLS.
///
/// # Errors
/// Certificates that TLS does not take.
pub fn server(tls: Option<&Tls>) -> Result<Server<Stack<Guard, Identity>>, tonic::transport::Error> {
    let server = Server::builder();
    let server = match tls {
        Some(tls) => server.tls_config(tls.server())?,
        None => server,
    };
    Ok(server.layer(Guard { tls: tls.is_some() }))
}

/// Answers questions about the schema of every service there is.
pub fn reflection()
-> tonic_reflection::server::v1::ServerReflectionServer<impl tonic_reflection::server::v1::ServerReflection> {
    tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(proto::SCHEMA)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()
        .expect("the schema is a descriptor set: it was made when this was built")
}

/// Who calls.
#[derive(Debug, Default)]
struct Caller {
    owner: Option<Owner>,
    address: Option<SocketAddr>,
}

impl Caller {
    fn of(extensions: &Extensions) -> Caller {
        let tls = extensions.get::<TlsConnectInfo<TcpConnectInfo>>();
        let certificates = tls.and_then(TlsConnectInfo::peer_certs);
        Caller {
            owner: certificates.and_then(|c| owner(c.first()?)),
            address: extensions.get::<TcpConnectInfo>().and_then(TcpConnectInfo::remote_addr),
        }
    }
}

/// `worker node-7 at 10.0.0.7:4312`
impl fmt::Display for Caller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let owner = self.owner.clone().unwrap_or_default();
        match owner.role {
            Some(role) => write!(f, "{role}")?,
            None => f.write_str("someone")?,
        }
        if let Some(name) = owner.name {
            // A certificate is its owner's text.
            write!(f, " {}", name.escape_debug())?;
        }
        match self.address {
            Some(address) => write!(f, " at {address}"),
            None => Ok(()),
        }
    }
}

/// Whether a call may pass.
fn judge(method: &str, tls: bool, caller: &Caller) -> Result<(), String> {
    let Some(roles) = allowed(method) else {
        return Err("W0053: there is no such method that anyone may call".into());
    };
    if !tls {
        return Ok(());
    }
    match caller.owner.as_ref().and_then(|o| o.role) {
        Some(role) if roles.contains(&role) => Ok(()),
        Some(role) => {
            let names: Vec<String> = roles.iter().map(Role::to_string).collect();
            Err(format!("W0054: the role {role} may not call this; it is for {}", names.join(" and ")))
        }
        None => Err("W0055: the certificate has no role; issue one with `coordinator certs add`".into()),
    }
}

/// The layer that refuses what the table does not allow.
#[derive(Clone, Copy, Debug)]
pub struct Guard {
    tls: bool,
}

impl<S> Layer<S> for Guard {
    type Service = Guarded<S>;
    fn layer(&self, inner: S) -> Guarded<S> {
        Guarded { inner, guard: *self }
    }
}

/// A service behind the table.
#[derive(Clone, Debug)]
pub struct Guarded<S> {
    inner: S,
    guard: Guard,
}

impl<S> Service<Request<Body>> for Guarded<S>
where
    S: Service<Request<Body>, Response = Response<Body>>,
    S::Future: Send + 'static,
    S::Error: 'static,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, S::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let method = request.uri().path();
        let caller = Caller::of(request.extensions());
        match judge(method, self.guard.tls, &caller) {
            Ok(()) => Box::pin(self.inner.call(request)),
            Err(why) => {
                let who = caller.to_string();
                tracing::warn!(target: "audit", %who, %method, %why, "refused");
                Box::pin(async move { Ok(Status::permission_denied(why).into_http()) })
            }
        }
    }
}
