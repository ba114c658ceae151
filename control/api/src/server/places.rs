//! Places of which each client may have a part, so that none takes them from the others.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Places of which there are so many, and so many for one client.
#[derive(Debug)]
pub struct Places {
    all: usize,
    /// Of one client.
    each: usize,
    taken: Mutex<Taken>,
}

#[derive(Debug, Default)]
struct Taken {
    all: usize,
    /// Clients that have one.
    by: HashMap<IpAddr, usize>,
}

impl Places {
    /// So many in all, and for one client.
    pub fn new(all: usize, each: usize) -> Arc<Self> {
        Arc::new(Self {
            all,
            each,
            taken: Mutex::default(),
        })
    }

    /// One for this client until it is dropped, unless there is none left or it has its part.
    pub fn take(self: &Arc<Self>, client: IpAddr) -> Option<Place> {
        let mut taken = self.taken();
        let own = taken.by.get(&client).copied().unwrap_or_default();
        if taken.all >= self.all || own >= self.each {
            return None;
        }
        taken.all += 1;
        taken.by.insert(client, own + 1);
        Some(Place {
            of: Arc::clone(self),
            client,
        })
    }

    fn taken(&self) -> MutexGuard<'_, Taken> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A place that is taken.
#[derive(Debug)]
pub struct Place {
    of: Arc<Places>,
    client: IpAddr,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.of.taken();
        taken.all -= 1;
        if let Some(own) = taken.by.get_mut(&self.client) {
            *own -= 1;
            if *own == 0 {
                taken.by.remove(&self.client);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_takes_all() {
        let places = Places::new(3, 2);
        let [a, b] = [1, 2].map(|last| IpAddr::from([192, 0, 2, last]));
        let of_a = [places.take(a), places.take(a)].map(Option::unwrap);
        assert!(places.take(a).is_none(), "it has its part");
        let of_b = places.take(b).unwrap();
        assert!(places.take(b).is_none(), "there are no more");
        drop(of_a);
        assert!(places.take(b).is_some());
        drop(of_b);
        assert!(places.taken().by.is_empty() && places.taken().all == 0);
    }
}
