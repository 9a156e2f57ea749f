//! Log lines on their way to standard error: a bounded queue with a writer thread behind it.
//!
//! A reader of standard error may stop reading: a paused terminal, a stuck log collector. Then no thread but the writer
//! waits. Lines that do not fit are dropped, counted and reported once lines pass again. `O_NONBLOCK` is no alternative: it would
//! change standard error for every process that shares it.

use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

/// The most lines that wait.
pub const CAPACITY: usize = 2048;
/// While the queue is full, a line waits for room for this long. If none comes, it is dropped, and further lines at once until
/// the writer has written one. A writer that is merely slow loses nothing.
const STUCK_TIMEOUT: Duration = Duration::from_millis(100);
/// The wait between two looks for room.
const RETRY_INTERVAL: Duration = Duration::from_millis(5);

pub struct Queue {
    sender: SyncSender<Message>,
    /// Lines that were dropped and are not reported yet.
    dropped: Arc<AtomicUsize>,
}

enum Message {
    Line(Vec<u8>),
    /// All lines before this are written when its channel closes.
    Flush(#[allow(dead_code)] SyncSender<()>),
}

impl Queue {
    /// Starts the thread that writes to `out`. `note` makes the line that reports dropped ones.
    pub fn start(
        mut out: impl Write + Send + 'static, note: impl Fn(usize) -> Vec<u8> + Send + 'static,
    ) -> io::Result<Self> {
        let (sender, receiver): (_, Receiver<Message>) = sync_channel(CAPACITY);
        let dropped = Arc::new(AtomicUsize::new(0));
        let queue = Queue { sender, dropped: dropped.clone() };
        let write = move || {
            for message in receiver {
                let Message::Line(line) = message else { continue };
                // There is no place to report a failure: standard error may be closed or full.
                let _ = out.write_all(&line);
                let dropped = dropped.swap(0, Ordering::Relaxed);
                if dropped > 0 {
                    let _ = out.write_all(&note(dropped));
                }
            }
        };
        thread::Builder::new().name("log".into()).spawn(write)?;
        Ok(queue)
    }

    /// Waits until every line is written, but no longer than this.
    pub fn flush(&self, within: Duration) {
        let end = Instant::now() + within;
        let (sender, written) = sync_channel(0);
        if self.send(Message::Flush(sender), within) {
            let _ = written.recv_timeout(end.saturating_duration_since(Instant::now())); // it closes, or it is late
        }
    }

    /// Adds a line, or drops it where the reader has stopped reading.
    pub fn push(&self, line: Vec<u8>) {
        let is_stuck = self.dropped.load(Ordering::Relaxed) > 0;
        if !self.send(Message::Line(line), if is_stuck { Duration::ZERO } else { STUCK_TIMEOUT }) {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Returns whether there was room within this time.
    fn send(&self, mut message: Message, within: Duration) -> bool {
        let end = Instant::now() + within;
        loop {
            message = match self.sender.try_send(message) {
                Err(TrySendError::Full(message)) if Instant::now() < end => message,
                outcome => return outcome.is_ok(),
            };
            thread::sleep(RETRY_INTERVAL);
        }
    }
}
