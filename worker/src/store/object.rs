//! A prefix of an object store: S3 and what speaks its protocol, or memory.
//!
//! Objects appear whole: a small one with one request, a large one as a multipart upload that is completed at its end and
//! aborted if anything goes wrong before. The requests run on a runtime of their own and the calling thread waits for
//! them, so that it may be any thread; the bytes that a caller gives are sent from where they lie.

use super::{Backend, Location, StoreError, shown};
use bytes::Bytes;
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{GetOptions, MultipartUpload, ObjectMeta, ObjectStore, ObjectStoreExt, PutPayload, PutPayloadMut};
use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::runtime::Runtime;
use tokio_stream::StreamExt;

/// Bytes of a part of a multipart upload, and of one request of a large download. S3 takes 5 MiB to 5 GiB.
const PIECE: u64 = 16 << 20;
/// The most parts of an upload.
const PARTS: u64 = 10_000;
/// Requests of one file under way at once: one hides the other's waiting.
const AT_ONCE: usize = 4;
/// A request, with the bytes of a piece, takes no longer; completing a large upload can take minutes.
#[cfg(feature = "s3")]
const TIMEOUT: std::time::Duration = std::time::Duration::from_secs(300);
/// So long a request that the network or an overloaded server failed is tried again.
#[cfg(feature = "s3")]
const RETRIES: std::time::Duration = std::time::Duration::from_secs(60);

/// A prefix of an object store.
pub struct Objects {
    store: Arc<dyn ObjectStore>,
    scheme: String,
    bucket: String,
    /// Empty for the whole bucket.
    prefix: String,
}

impl Objects {
    pub fn open(location: &str, scheme: &str, bucket: &str, prefix: &str) -> Result<Objects, StoreError> {
        let refuse = |why: String| StoreError::Location { location: shown(location), why };
        let store = if scheme == "s3" { s3(bucket).map_err(refuse)? } else { memory(bucket) };
        Ok(Objects { store, scheme: scheme.into(), bucket: bucket.into(), prefix: prefix.into() })
    }

    fn at(&self, path: &str) -> Result<Path, StoreError> {
        let at = if self.prefix.is_empty() { path.into() } else { format!("{}/{path}", self.prefix) };
        Path::parse(&at).map_err(|e| self.failed("name", path, e))
    }

    fn failed(&self, what: &'static str, path: &str, e: impl Into<object_store::Error>) -> StoreError {
        let (e, path) = (e.into(), self.full(path));
        let why: String = e.to_string().chars().take(600).collect();
        match e {
            object_store::Error::NotFound { .. } => StoreError::NotFound { path },
            object_store::Error::PermissionDenied { .. } | object_store::Error::Unauthenticated { .. } => {
                StoreError::Denied { what, path, why }
            }
            // Where a virtual machine of Amazon's would get credentials from: none are set.
            _ if why.contains("169.254.169.254") => StoreError::Denied { what, path, why: "no credentials".into() },
            _ => StoreError::Failed { what, path, why },
        }
    }

    /// Reads a range of a file of that state in pieces.
    fn pieces(&self, path: &str, meta: ObjectMeta, range: Range<u64>) -> Result<Bytes, StoreError> {
        let failed = |e| self.failed("read", path, e);
        let length = usize::try_from(range.end - range.start).unwrap_or(usize::MAX);
        let mut bytes = Vec::new();
        bytes.try_reserve_exact(length).map_err(|e| failed(generic(e)))?;
        let mut requests = AtOnce::default();
        for start in range.clone().step_by(PIECE as usize) {
            let piece = start..range.end.min(start + PIECE);
            // Pieces of one state of the file, whoever writes it meanwhile.
            let options = GetOptions { range: Some(piece.into()), if_match: meta.e_tag.clone(), ..Default::default() };
            let (store, at) = (self.store.clone(), meta.location.clone());
            let done = requests.start(async move { store.get_opts(&at, options).await?.bytes().await });
            done.into_iter().try_for_each(|b| b.map(|b| bytes.extend_from_slice(&b))).map_err(failed)?;
        }
        requests.rest().try_for_each(|b| b.map(|b| bytes.extend_from_slice(&b))).map_err(failed)?;
        if bytes.len() != length { Err(failed(generic("it is cut short"))) } else { Ok(bytes.into()) }
    }

    fn meta(&self, at: &Path) -> Result<ObjectMeta, object_store::Error> {
        let (store, at) = (self.store.clone(), at.clone());
        wait(async move { store.head(&at).await })
    }
}

impl Backend for Objects {
    fn contains(&self, other: &str) -> bool {
        let Ok(Location::Objects { scheme, bucket, prefix }) = Location::parse(other) else { return false };
        let below = || prefix.strip_prefix(&self.prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
        (scheme, bucket) == (&self.scheme, &self.bucket) && (self.prefix.is_empty() || below())
    }

    fn list(&self, path: &str) -> Result<Vec<String>, StoreError> {
        let (store, at) = (self.store.clone(), self.at(path)?);
        let found = wait(async move { store.list_with_delimiter(Some(&at)).await });
        let found = found.map_err(|e| self.failed("list", path, e))?;
        let all = found.common_prefixes.into_iter().chain(found.objects.into_iter().map(|o| o.location));
        Ok(all.filter_map(|p| p.filename().map(String::from)).collect())
    }

    fn put(&self, path: &str, parts: &mut dyn Iterator<Item = Bytes>) -> Result<u64, StoreError> {
        let (store, at) = (self.store.clone(), self.at(path)?);
        let failed = |e| self.failed("write", path, e);
        let mut rest = Bytes::new();
        let mut payload = piece(&mut rest, parts);
        let mut bytes = payload.content_length() as u64;
        if bytes < PIECE {
            wait(async move { store.put(&at, payload).await }).map_err(failed)?;
            return Ok(bytes);
        }
        let mut upload = Upload::begin(store, at).map_err(failed)?;
        loop {
            if bytes > PIECE * PARTS {
                return Err(StoreError::TooLarge { path: self.full(path), size: bytes, limit: PIECE * PARTS });
            }
            upload.add(payload).map_err(failed)?;
            payload = piece(&mut rest, parts);
            if payload.content_length() == 0 {
                break;
            }
            bytes += payload.content_length() as u64;
        }
        upload.complete().map_err(failed)?;
        Ok(bytes)
    }

    fn get(&self, path: &str, limit: u64) -> Result<Bytes, StoreError> {
        let (store, at) = (self.store.clone(), self.at(path)?);
        let got = wait(async move {
            let got = store.get(&at).await?;
            let meta = got.meta.clone();
            let bytes = if meta.size <= limit.min(PIECE) { Some(got.bytes().await?) } else { None };
            Ok((meta, bytes))
        });
        match got.map_err(|e| self.failed("read", path, e))? {
            (_, Some(bytes)) => Ok(bytes),
            (meta, None) if meta.size > limit => {
                Err(StoreError::TooLarge { path: self.full(path), size: meta.size, limit })
            }
            (meta, None) => {
                let all = 0..meta.size;
                self.pieces(path, meta, all)
            }
        }
    }

    fn get_range(&self, path: &str, range: Range<u64>) -> Result<Bytes, StoreError> {
        let at = self.at(path)?;
        if range.end - range.start <= PIECE {
            let (store, at, range) = (self.store.clone(), at.clone(), range.clone());
            let length = range.end - range.start;
            match wait(async move { store.get_range(&at, range).await }) {
                Ok(bytes) if bytes.len() as u64 == length => return Ok(bytes),
                Err(e @ object_store::Error::NotFound { .. }) => return Err(self.failed("read", path, e)),
                // Too short a file is cut off by some stores and an error of others.
                Ok(_) | Err(_) => {}
            }
        }
        let meta = self.meta(&at).map_err(|e| self.failed("read", path, e))?;
        if meta.size < range.end {
            let path = self.full(path);
            return Err(StoreError::Range { path, start: range.start, end: range.end, size: meta.size });
        }
        self.pieces(path, meta, range)
    }

    fn size(&self, path: &str) -> Result<Option<u64>, StoreError> {
        match self.meta(&self.at(path)?) {
            Ok(meta) => Ok(Some(meta.size)),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(e) => Err(self.failed("look at", path, e)),
        }
    }

    fn delete(&self, path: &str) -> Result<(), StoreError> {
        let (store, at) = (self.store.clone(), self.at(path)?);
        let done = wait(async move {
            let below = store.list(Some(&at)).map(|found| found.map(|o| o.location));
            let mut deleted = store.delete_stream(Box::pin(tokio_stream::once(Ok(at)).chain(below)));
            while let Some(one) = deleted.next().await {
                match one {
                    Ok(_) | Err(object_store::Error::NotFound { .. }) => {}
                    Err(e) => return Err(e),
                }
            }
            Ok(())
        });
        done.map_err(|e| self.failed("delete", path, e))
    }

    fn full(&self, path: &str) -> String {
        let names = [&self.bucket, &self.prefix, path].map(|n| n.trim_matches('/'));
        let names: Vec<&str> = names.into_iter().filter(|n| !n.is_empty()).collect();
        format!("{}://{}", self.scheme, names.join("/"))
    }
}

/// The next piece of what the parts are together: [`PIECE`] bytes, fewer at the end. Nothing is copied.
fn piece(rest: &mut Bytes, parts: &mut dyn Iterator<Item = Bytes>) -> PutPayload {
    let mut piece = PutPayloadMut::new();
    let mut room = PIECE as usize;
    while room > 0 {
        if rest.is_empty() {
            match parts.next() {
                Some(part) => *rest = part,
                None => break,
            }
        }
        let some = rest.split_to(rest.len().min(room));
        room -= some.len();
        piece.push(some);
    }
    piece.freeze()
}

/// A multipart upload, which is aborted unless it is completed.
struct Upload {
    /// None once it is completed.
    upload: Option<Box<dyn MultipartUpload>>,
    requests: AtOnce<Result<(), object_store::Error>>,
}

impl Upload {
    fn begin(store: Arc<dyn ObjectStore>, at: Path) -> Result<Upload, object_store::Error> {
        let upload = wait(async move { store.put_multipart(&at).await })?;
        Ok(Upload { upload: Some(upload), requests: AtOnce::default() })
    }

    fn add(&mut self, piece: PutPayload) -> Result<(), object_store::Error> {
        let Some(upload) = &mut self.upload else { return Err(generic("the upload has ended")) };
        self.requests.start(upload.put_part(piece)).unwrap_or(Ok(()))
    }

    fn complete(mut self) -> Result<(), object_store::Error> {
        self.requests.rest().collect::<Result<(), _>>()?;
        let Some(mut upload) = self.upload.take() else { return Err(generic("the upload has ended")) };
        wait(async move {
            match upload.complete().await {
                Ok(_) => Ok(()),
                Err(e) => {
                    // Whether it succeeds or not, what counts is why there is no object.
                    let _ = upload.abort().await;
                    Err(e)
                }
            }
        })
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        if let Some(mut upload) = self.upload.take() {
            // A part that arrives after the abort would be kept, and paid for.
            self.requests.rest().for_each(drop);
            // A store that is out of reach keeps the parts; its rules for unfinished uploads delete them.
            let _ = wait(async move { upload.abort().await });
        }
    }
}

/// Requests of which [`AT_ONCE`] run at once; their results come in order.
struct AtOnce<T>(VecDeque<Receiver<T>>);

impl<T> Default for AtOnce<T> {
    fn default() -> Self {
        AtOnce(VecDeque::with_capacity(AT_ONCE))
    }
}

impl<T: Send + 'static> AtOnce<Result<T, object_store::Error>> {
    /// Starts another one; gives the result of the oldest if it had to be waited for.
    fn start(
        &mut self,
        request: impl Future<Output = Result<T, object_store::Error>> + Send + 'static,
    ) -> Option<Result<T, object_store::Error>> {
        let done = if self.0.len() == AT_ONCE { self.0.pop_front().map(received) } else { None };
        match start(request) {
            Ok(receiver) => self.0.push_back(receiver),
            Err(e) => return Some(Err(e)),
        }
        done
    }

    /// The results of those that are still under way.
    fn rest(&mut self) -> impl Iterator<Item = Result<T, object_store::Error>> {
        self.0.drain(..).map(received)
    }
}

/// Starts a request on the stores' runtime, which lives as long as the process: a runtime must not be dropped by a thread
/// of another one.
fn start<T: Send + 'static>(
    request: impl Future<Output = T> + Send + 'static,
) -> Result<Receiver<T>, object_store::Error> {
    static RUNTIME: Mutex<Option<Runtime>> = Mutex::new(None);
    let mut runtime = RUNTIME.lock().unwrap_or_else(PoisonError::into_inner);
    let runtime = match &mut *runtime {
        Some(runtime) => runtime,
        none => {
            let mut builder = tokio::runtime::Builder::new_multi_thread();
            let new = builder.worker_threads(2).thread_name("store").enable_all().build();
            none.insert(new.map_err(generic)?)
        }
    };
    let (sender, receiver) = sync_channel(1);
    runtime.spawn(async move {
        // Nobody waits any more if the caller panics.
        let _ = sender.send(request.await);
    });
    Ok(receiver)
}

/// Waits for a request, whatever thread this is.
fn wait<T: Send + 'static>(
    request: impl Future<Output = Result<T, object_store::Error>> + Send + 'static,
) -> Result<T, object_store::Error> {
    received(start(request)?)
}

fn received<T>(receiver: Receiver<Result<T, object_store::Error>>) -> Result<T, object_store::Error> {
    receiver.recv().unwrap_or_else(|_| Err(generic("the request was given up")))
}

fn generic(why: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> object_store::Error {
    object_store::Error::Generic { store: "request", source: why.into() }
}

/// The process's store in memory of that name.
fn memory(name: &str) -> Arc<dyn ObjectStore> {
    static STORES: Mutex<BTreeMap<String, Arc<InMemory>>> = Mutex::new(BTreeMap::new());
    STORES.lock().unwrap_or_else(PoisonError::into_inner).entry(name.into()).or_default().clone()
}

/// A bucket, by the process's `AWS_*` variables.
#[cfg(feature = "s3")]
fn s3(bucket: &str) -> Result<Arc<dyn ObjectStore>, String> {
    use object_store::aws::AmazonS3Builder;
    use object_store::{ClientOptions, RetryConfig};
    // Fails if there is one already, and that one is as good.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let allow_http = std::env::var("AWS_ALLOW_HTTP").is_ok_and(|v| matches!(&*v.to_lowercase(), "true" | "1"));
    let client = ClientOptions::new().with_timeout(TIMEOUT).with_allow_http(allow_http);
    let retry = RetryConfig { max_retries: 8, retry_timeout: RETRIES, ..Default::default() };
    let builder = AmazonS3Builder::from_env().with_bucket_name(bucket).with_client_options(client).with_retry(retry);
    Ok(Arc::new(builder.build().map_err(|e| e.to_string())?))
}

#[cfg(not(feature = "s3"))]
fn s3(_: &str) -> Result<Arc<dyn ObjectStore>, String> {
    Err("this program was built without the feature `s3`".into())
}
