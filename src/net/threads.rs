//! Blocking calls and look-ups of names, each on its own thread. A call that hangs blocks nothing else, and a thread that
//! cannot be started fails one call; tokio's and reqwest's own threads would end the process.

use std::error::Error;
use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::thread;
use std::vec;

use hyper_util::client::legacy::connect::dns::Name;
use reqwest::dns;
use tokio::sync::{Semaphore, oneshot};
use tower_service::Service;

use crate::text::causes;

/// The most names that are looked up at once. Several, so that a look-up that hangs does not delay the others.
const MAX_LOOK_UPS: usize = 16;

/// The operating system refuses a thread.
#[derive(Debug, thiserror::Error)]
#[error("cannot start a thread: {0}{hint}", hint = if .0.kind() == io::ErrorKind::PermissionDenied { OLD_ENGINE } else { "" })]
pub struct NoThread(io::Error);

/// Docker before 20.10.10 answers clone3 with EPERM instead of ENOSYS.
const OLD_ENGINE: &str = "; update the container engine, whose seccomp profile may be too old for clone3";

impl NoThread {
    /// Whether another start may get a thread: a limit may pass, and an engine that refuses clone3 stays as it is.
    pub fn may_pass(&self) -> bool {
        self.0.kind() != io::ErrorKind::PermissionDenied
    }

    /// The reason in a chain of errors, if a thread is refused.
    pub fn find(error: &(dyn Error + 'static)) -> Option<String> {
        let mut cause = Some(error);
        while let Some(error) = cause {
            if let Some(refused) = error.downcast_ref::<NoThread>() {
                return Some(refused.to_string());
            }
            // an io::Error does not name the error within it as its source
            let within = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
            cause = within.map(|error| error as &(dyn Error + 'static)).or_else(|| error.source());
        }
        None
    }

    /// The reason in the error of a library whose start needs a thread, if the thread is refused.
    pub fn in_start(error: &(dyn Error + 'static)) -> Option<Self> {
        let cause = causes(error).find_map(|error| error.downcast_ref::<io::Error>())?;
        let kinds = [io::ErrorKind::PermissionDenied, io::ErrorKind::WouldBlock];
        kinds.contains(&cause.kind()).then(|| NoThread(io::Error::from(cause.kind())))
    }
}

pub fn spawn(name: &str, run: impl FnOnce() + Send + 'static) -> Result<(), NoThread> {
    thread::Builder::new().name(name.into()).spawn(run).map(drop).map_err(NoThread)
}

pub async fn blocking<T: Send + 'static>(
    name: &str, call: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Box<dyn Error + Send + Sync>> {
    let (sender, receiver) = oneshot::channel();
    spawn(name, move || _ = sender.send(call()))?;
    Ok(receiver.await?)
}

/// Looks up names for hyper and for reqwest.
#[derive(Clone)]
pub struct Resolver(Arc<Semaphore>);

type LookUp = Pin<Box<dyn Future<Output = Result<vec::IntoIter<SocketAddr>, Box<dyn Error + Send + Sync>>> + Send>>;

impl Resolver {
    /// A resolver with its own bound of threads.
    pub fn new() -> Self {
        Resolver(Arc::new(Semaphore::new(MAX_LOOK_UPS)))
    }

    fn look_up(&self, name: String) -> LookUp {
        let permits = self.0.clone();
        Box::pin(async move {
            let permit = permits.acquire_owned().await?;
            let looked_up = blocking("look-up", move || {
                let _permit = permit; // until the look-up ends, even if nobody waits for it any more
                (&*name, 0).to_socket_addrs()
            });
            Ok(looked_up.await??)
        })
    }
}

impl Service<Name> for Resolver {
    type Response = vec::IntoIter<SocketAddr>;
    type Error = Box<dyn Error + Send + Sync>;
    type Future = LookUp;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, name: Name) -> LookUp {
        self.look_up(name.as_str().to_owned())
    }
}

impl dns::Resolve for Resolver {
    fn resolve(&self, name: dns::Name) -> dns::Resolving {
        let found = self.look_up(name.as_str().to_owned());
        Box::pin(async move { Ok(Box::new(found.await?) as dns::Addrs) })
    }
}
