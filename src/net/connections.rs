//! Which connection closes when a server has no place left.

use std::collections::BTreeMap;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use hyper::body::{Body, Frame, SizeHint};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::AbortHandle;
use tokio::time::timeout;

/// The wait between two tries to accept a connection or to find a place for it.
pub const RETRY_INTERVAL: Duration = Duration::from_millis(100);

/// The connections that may be closed to make room, from the one that has waited longest.
#[derive(Default)]
pub struct Closable(Mutex<Numbered>);

#[derive(Default)]
struct Numbered {
    next: u64,
    tasks: BTreeMap<u64, AbortHandle>,
}

impl Closable {
    /// A new connection, which does not wait yet.
    pub fn connection(self: &Arc<Self>) -> Arc<Waiting> {
        Arc::new(Waiting { closable: self.clone(), task: OnceLock::new(), number: Mutex::default() })
    }

    /// A place for one more connection.
    pub async fn place(&self, places: &Arc<Semaphore>) -> io::Result<OwnedSemaphorePermit> {
        if let Ok(place) = places.clone().try_acquire_owned() {
            return Ok(place);
        }
        loop {
            self.close_first();
            if let Ok(place) = timeout(RETRY_INTERVAL, places.clone().acquire_owned()).await {
                return place.map_err(io::Error::other);
            }
        }
    }

    /// Closes the connection that has waited longest.
    pub fn close_first(&self) {
        if let Some((_, task)) = self.lock().tasks.pop_first() {
            task.abort();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Numbered> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A connection's entry among those that may be closed.
pub struct Waiting {
    closable: Arc<Closable>,
    task: OnceLock<AbortHandle>,
    number: Mutex<Option<u64>>,
}

impl Waiting {
    /// The connection waits for its first request. Aborting this task closes it.
    pub fn begin(&self, task: AbortHandle) {
        let _ = self.task.set(task);
        self.start();
    }

    fn start(&self) {
        let Some(task) = self.task.get().filter(|task| !task.is_finished()) else { return };
        let mut numbered = self.closable.lock();
        let number = numbered.next;
        numbered.next += 1;
        numbered.tasks.insert(number, task.clone());
        *self.number() = Some(number);
    }

    fn end(&self) {
        let number = self.number().take();
        if let Some(number) = number {
            self.closable.lock().tasks.remove(&number);
        }
    }

    fn number(&self) -> MutexGuard<'_, Option<u64>> {
        self.number.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.end();
    }
}

/// While this exists, a request of its connection is being answered, and the connection is not closed to make room.
pub struct Answering(Arc<Waiting>);

impl Answering {
    /// A request has come.
    pub fn start(waiting: Arc<Waiting>) -> Self {
        waiting.end();
        Answering(waiting)
    }
}

impl Drop for Answering {
    fn drop(&mut self) {
        self.0.start();
    }
}

/// The body of an answer. Its request counts as being answered until the body is dropped.
pub struct Tracked<B> {
    body: B,
    _answering: Option<Answering>,
}

impl<B> Tracked<B> {
    /// Tracks this body.
    pub fn new(body: B, answering: Option<Answering>) -> Self {
        Tracked { body, _answering: answering }
    }
}

impl<B: Body + Unpin> Body for Tracked<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
