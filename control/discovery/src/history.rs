//! The latest changes, so that a watch that broke off goes on where it was.
//!
//! Bounded by number and by weight: what is too old is forgotten, and whoever needs it begins anew. It is made of what
//! the log's entries came to, which is the same at all members; so a watch goes on at any of them.

use std::collections::VecDeque;
use std::sync::{Arc, OnceLock};

use axum::body::Bytes;
use flynn_api::discovery::{Event, EventKind, Position};

use crate::weight;

/// Changes that are kept.
pub const MAX_CHANGES: usize = 16_384;
/// Bytes that they may come to, about.
const MAX_WEIGHT: usize = 8 << 20;

/// An event, and its place among those of all.
#[derive(Debug)]
pub struct Change {
    /// What happened.
    pub event: Event,
    /// Behind it.
    pub position: Position,
    weight: usize,
    frame: OnceLock<Bytes>,
}

/// An event as it stands in a stream, with its place if it has one.
pub fn frame(event: &Event, position: Option<Position>) -> Bytes {
    // An event is made of maps with text as keys: writing it cannot fail. Its JSON has no line breaks.
    let json = serde_json::to_string(event).unwrap_or_default();
    match position {
        Some(position) => format!("data: {json}\nid: {position}\n\n").into(),
        None => format!("data: {json}\n\n").into(),
    }
}

impl Change {
    /// It as it stands in a stream, written once for all watchers.
    pub fn frame(&self) -> Bytes {
        self.frame
            .get_or_init(|| frame(&self.event, Some(self.position)))
            .clone()
    }

    /// Whether it is told to who watches `service`, which knows nothing of numbers, or all services (`None`), which are
    /// told no metadata, for it may be secret.
    pub fn concerns(&self, service: Option<&str>) -> bool {
        match service {
            Some(service) => {
                self.event.service == service
                    && !matches!(self.event.kind, EventKind::Service | EventKind::ServiceGone)
            }
            None => self.event.kind != EventKind::ServiceMeta,
        }
    }
}

/// The changes.
#[derive(Debug)]
pub struct History {
    changes: VecDeque<Arc<Change>>,
    weight: usize,
    /// Everything behind this is there.
    begins: Position,
}

impl Default for History {
    fn default() -> Self {
        Self::from(0)
    }
}

impl History {
    /// An empty history that begins behind `index`.
    pub fn from(index: u64) -> Self {
        Self {
            changes: VecDeque::new(),
            weight: 0,
            begins: Position::behind(index),
        }
    }

    /// Adds what the entry at `index` came to.
    pub fn push(&mut self, index: u64, events: Vec<Event>) -> impl Iterator<Item = &Arc<Change>> {
        let (last, added) = (events.len(), events.len());
        for (part, event) in (1_u32..).zip(events) {
            let position = if part as usize == last {
                Position::behind(index)
            } else {
                Position::within(index, part - 1)
            };
            let weight = weigh(&event);
            self.weight += weight;
            self.changes.push_back(Arc::new(Change {
                event,
                position,
                weight,
                frame: OnceLock::new(),
            }));
        }
        // What was just added is still to be told, however much it is.
        while (self.changes.len() > MAX_CHANGES || self.weight > MAX_WEIGHT) && self.changes.len() > added {
            if let Some(oldest) = self.changes.pop_front() {
                self.weight -= oldest.weight;
                self.begins = oldest.position;
            }
        }
        self.changes.range(self.changes.len() - added..)
    }

    /// What came behind `position`; nothing when not all of it is known any more.
    pub fn after(&self, position: Position) -> Option<impl Iterator<Item = &Arc<Change>>> {
        let from = self.changes.partition_point(|change| change.position <= position);
        (position >= self.begins).then(|| self.changes.range(from..))
    }
}

/// About how many bytes an event takes, its frame included.
fn weigh(event: &Event) -> usize {
    let instance = event.instance.as_ref().map_or(0, weight::instance);
    let meta = event
        .service_meta
        .as_ref()
        .map_or(0, |meta| weight::json(&meta.data));
    2 * (200 + event.service.len() + instance + meta)
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    fn seen(history: &History, position: Position) -> Option<Vec<String>> {
        let after = history.after(position)?;
        Some(after.map(|change| change.position.to_string()).collect())
    }

    fn events(index: u64, count: usize) -> Vec<Event> {
        (0..count)
            .map(|_| Event::new("web", EventKind::Up, index))
            .collect()
    }

    #[test]
    fn goes_on_within_one_write_too() {
        let mut history = History::from(4);
        drop(history.push(5, events(5, 3)));
        drop(history.push(9, events(9, 1)));
        assert_eq!(
            seen(&history, Position::behind(4)).unwrap(),
            ["5.0", "5.1", "5", "9"]
        );
        assert_eq!(seen(&history, Position::within(5, 0)).unwrap(), ["5.1", "5", "9"]);
        assert_eq!(seen(&history, Position::behind(7)).unwrap(), ["9"]);
        assert_eq!(seen(&history, Position::behind(9)).unwrap(), [""; 0]);
        assert_eq!(seen(&history, Position::behind(3)), None);
    }

    #[test]
    fn is_bounded_and_says_what_it_forgot() {
        let mut history = History::default();
        for index in 1..=20_000 {
            drop(history.push(index, events(index, 2)));
        }
        assert_eq!(history.changes.len(), MAX_CHANGES);
        let oldest = history.changes[0].position.index;
        assert!(seen(&history, Position::behind(oldest - 2)).is_none());
        assert_eq!(
            seen(&history, Position::behind(oldest - 1)).unwrap().len(),
            MAX_CHANGES
        );

        let mut meta = Event::new("web", EventKind::ServiceMeta, 1);
        meta.service_meta = Some(flynn_api::discovery::ServiceMeta {
            data: Value::String("x".repeat(1 << 20)),
            ..Default::default()
        });
        for index in 20_001..20_100 {
            drop(history.push(index, vec![meta.clone()]));
        }
        assert!(history.weight <= MAX_WEIGHT && history.changes.len() < 5);
        // More at once than is kept: it is told all the same, and forgotten with the next.
        assert_eq!(
            history.push(30_000, events(30_000, 2 * MAX_CHANGES)).count(),
            2 * MAX_CHANGES
        );
        assert_eq!(history.push(30_001, events(30_001, 1)).count(), 1);
        assert_eq!(history.changes.len(), MAX_CHANGES);
        assert!(seen(&history, Position::within(30_000, 5)).is_none());
    }
}
