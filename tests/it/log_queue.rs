//! The queue of the log. `operating_system.rs` has what becomes of it where nobody reads standard error.

use std::io::{self, Write};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;
use std::time::Duration;

use baletheus::log_queue::{CAPACITY, Queue};

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
fn a_slow_reader_loses_nothing() {
    let (queue, reader) = queue();
    let reader = thread::spawn(move || reader.iter().take(3 * CAPACITY).map(|line| line.len()).sum::<usize>());
    for _ in 0..3 * CAPACITY {
        queue.push(b"line".to_vec());
    }
    assert_eq!(reader.join().unwrap(), 3 * CAPACITY * 4);
}

#[test]
fn a_flush_ends_when_all_is_written() {
    let (queue, reader) = queue();
    let reader = thread::spawn(move || reader.iter().count());
    for _ in 0..100 {
        queue.push(b"line".to_vec());
    }
    queue.flush(Duration::from_secs(60));
    drop(queue);
    assert_eq!(reader.join().unwrap(), 100);
}
