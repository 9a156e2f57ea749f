//! Log lines on their way to standard error: a bounded queue with a writer thread behind it.
//!
//! A reader of standard error may stop reading: a paused terminal, a stuck log collector. Then no thread but the writer
//! waits. Lines that do not fit are dropped, counted and reported once lines pass again. `O_NONBLOCK` is no alternative: it would
//! change standard error for every process that shares it.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// The most bytes that wait.
const CAPACITY: usize = 1 << 20;
/// While the queue is full, lines wait for room until a single write has taken this long; then they are dropped. A writer that is
/// merely slow loses nothing.
const STUCK_TIMEOUT: Duration = Duration::from_millis(100);

/// The queue. Its clones share it.
#[derive(Clone)]
pub struct Queue(Arc<Shared>);

struct Shared {
    state: Mutex<State>,
    /// Notified when a line comes.
    filled: Condvar,
    /// Notified when lines are written.
    drained: Condvar,
}

#[derive(Default)]
struct State {
    lines: VecDeque<Vec<u8>>,
    bytes: usize,
    dropped: usize,
    /// When the current write began; none while there is nothing to write.
    writing: Option<Instant>,
}

impl Queue {
    /// Starts the thread that writes to `out`. `note` makes the line that reports dropped ones.
    ///
    /// # Errors
    /// The system refuses the thread.
    pub fn start(
        out: impl Write + Send + 'static, note: impl Fn(usize) -> Vec<u8> + Send + 'static,
    ) -> io::Result<Self> {
        let queue =
            Queue(Arc::new(Shared { state: Mutex::default(), filled: Condvar::new(), drained: Condvar::new() }));
        let writer = queue.clone();
        thread::Builder::new().name("log".into()).spawn(move || writer.write_all(out, &note))?;
        Ok(queue)
    }

    /// Waits until every line is written, but no longer than this.
    pub fn flush(&self, within: Duration) {
        let end = Instant::now() + within;
        let mut state = self.state();
        while state.writing.is_some() || !state.lines.is_empty() {
            let Some(left) = end.checked_duration_since(Instant::now()) else { return };
            state = self.0.drained.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Adds a line, or drops it where the reader has stopped reading.
    pub fn push(&self, line: Vec<u8>) {
        let mut state = self.state();
        while state.bytes + line.len() > CAPACITY && !state.lines.is_empty() {
            let stuck = state.writing.map_or(Duration::ZERO, |since| since.elapsed());
            let Some(left) = STUCK_TIMEOUT.checked_sub(stuck).filter(|left| !left.is_zero()) else {
                state.dropped += 1;
                return;
            };
            state = self.0.drained.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        state.bytes += line.len();
        state.lines.push_back(line);
        self.0.filled.notify_one();
    }

    fn write_all(&self, mut out: impl Write, note: &impl Fn(usize) -> Vec<u8>) {
        loop {
            let mut state = self.state();
            while state.lines.is_empty() {
                state = self.0.filled.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            let lines = std::mem::take(&mut state.lines);
            let dropped = std::mem::take(&mut state.dropped);
            (state.bytes, state.writing) = (0, Some(Instant::now()));
            drop(state);
            self.0.drained.notify_all(); // there is room again
            for line in lines {
                // There is no place to report this: standard error may be closed or full.
                let _ = out.write_all(&line);
                self.state().writing = Some(Instant::now());
            }
            if dropped > 0 {
                let _ = out.write_all(&note(dropped));
            }
            self.state().writing = None;
            self.0.drained.notify_all();
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

    /// Each write waits until the test takes its bytes.
    struct Slow(SyncSender<Vec<u8>>);

    impl Write for Slow {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.send(bytes.to_vec()).map_err(io::Error::other)?;
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn queue() -> (Queue, Receiver<Vec<u8>>) {
        let (sender, receiver) = sync_channel(0);
        let note = |dropped| format!("{dropped} dropped").into_bytes();
        (Queue::start(Slow(sender), note).unwrap(), receiver)
    }

    #[test]
    fn a_reader_that_stops_costs_lines_and_no_time_and_the_loss_is_reported() {
        let (queue, reader) = queue();
        let line = vec![b'x'; CAPACITY / 4];
        let start = Instant::now();
        for _ in 0..50 {
            queue.push(line.clone());
        }
        assert!(start.elapsed() < STUCK_TIMEOUT * 20, "{:?}", start.elapsed());
        queue.flush(Duration::from_millis(10));
        let mut read = Vec::new();
        while read.last().is_none_or(|last: &Vec<u8>| !last.ends_with(b" dropped")) {
            read.push(reader.recv().unwrap());
        }
        let whole = read.iter().filter(|read| **read == line).count();
        let note = String::from_utf8(read.pop().unwrap()).unwrap();
        assert_eq!(note, format!("{} dropped", 50 - whole));
        assert!((4..=9).contains(&whole), "{whole}");
        queue.push(b"after".to_vec());
        assert_eq!(reader.recv().unwrap(), b"after");
    }

    #[test]
    fn a_slow_reader_loses_nothing() {
        let (queue, reader) = queue();
        let reader = thread::spawn(move || reader.iter().take(400).map(|line| line.len()).sum::<usize>());
        for _ in 0..400 {
            queue.push(vec![b'x'; 20_000]);
        }
        assert_eq!(reader.join().unwrap(), 400 * 20_000);
    }
}
