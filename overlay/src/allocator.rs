//! Which of a host's addresses are free.

use std::{
    collections::{BTreeSet, VecDeque},
    net::Ipv4Addr,
};

use ipnet::Ipv4Net;

/// The addresses of a host's subnet. The first is the network's own, the second the gateway's and the last the
/// broadcast's: containers get the others.
///
/// It remembers nothing but what it is told, and gives the same addresses for the same calls. An address that was
/// released waits until all that were released before it, or never used, were given: caches elsewhere that still know
/// it for its last owner have time to forget.
#[derive(Clone, Debug)]
pub struct Allocator {
    subnet: Ipv4Net,
    free: VecDeque<Ipv4Addr>,
    taken: BTreeSet<Ipv4Addr>,
}

impl Allocator {
    /// An allocator for a subnet some of whose addresses are in use. Those outside it are passed over.
    pub fn new(subnet: Ipv4Net, in_use: impl IntoIterator<Item = Ipv4Addr>) -> Self {
        let (containers, in_use) = (containers(subnet), in_use.into_iter().collect::<BTreeSet<_>>());
        let (taken, free): (Vec<_>, Vec<_>) = containers.partition(|address| in_use.contains(address));
        Self {
            subnet,
            free: free.into(),
            taken: taken.into_iter().collect(),
        }
    }

    /// Puts free addresses that had owners until lately behind the others, as if they were released now in this order.
    pub fn rest(&mut self, lately: impl IntoIterator<Item = Ipv4Addr>) {
        for address in lately {
            if let Some(place) = self.free.iter().position(|free| *free == address) {
                self.free.remove(place);
                self.free.push_back(address);
            }
        }
    }

    /// An address that nobody has, or `None` when all are taken.
    pub fn allocate(&mut self) -> Option<Ipv4Addr> {
        let address = self.free.pop_front()?;
        self.taken.insert(address);
        Some(address)
    }

    /// The same for who has no use for it yet: never the last one, which somebody may come for.
    pub fn allocate_in_advance(&mut self) -> Option<Ipv4Addr> {
        if self.free.len() < 2 {
            return None;
        }
        self.allocate()
    }

    /// Takes an address back: whether it was taken.
    pub fn release(&mut self, address: Ipv4Addr) -> bool {
        let was_taken = self.taken.remove(&address);
        if was_taken {
            self.free.push_back(address);
        }
        was_taken
    }

    /// The host's own address in the subnet.
    pub fn gateway(&self) -> Ipv4Addr {
        gateway(self.subnet)
    }

    /// The addresses that are taken.
    pub fn taken(&self) -> impl Iterator<Item = Ipv4Addr> + '_ {
        self.taken.iter().copied()
    }
}

/// The host's own address in a subnet.
pub(crate) fn gateway(subnet: Ipv4Net) -> Ipv4Addr {
    Ipv4Addr::from_bits(subnet.network().to_bits().saturating_add(1))
}

/// Whether an address of the subnet may be a container's.
pub(crate) fn is_for_containers(subnet: Ipv4Net, address: Ipv4Addr) -> bool {
    subnet.network() < address && address < subnet.broadcast() && address != gateway(subnet)
}

fn containers(subnet: Ipv4Net) -> impl Iterator<Item = Ipv4Addr> {
    (subnet.network().to_bits()..=subnet.broadcast().to_bits())
        .map(Ipv4Addr::from_bits)
        .filter(move |&address| is_for_containers(subnet, address))
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    fn subnet() -> Ipv4Net {
        "100.100.1.0/24".parse().unwrap()
    }

    #[derive(Clone, Debug)]
    enum Step {
        Allocate,
        Release(u8),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![3 => Just(Step::Allocate), 2 => any::<u8>().prop_map(Step::Release)]
    }

    proptest! {
        #[test]
        fn no_address_is_given_twice(in_use in vec(any::<u8>(), 0..40), steps in vec(step(), 0..800)) {
            let at = |last: u8| Ipv4Addr::new(100, 100, 1, last);
            let mut allocator = Allocator::new(subnet(), in_use.iter().map(|&last| at(last)));
            let mut model: BTreeSet<_> = in_use.iter().copied().filter(|last| (2..=254).contains(last)).map(at).collect();
            for step in steps {
                match step {
                    Step::Allocate => {
                        let given = allocator.allocate();
                        prop_assert_eq!(given.is_none(), model.len() == 253);
                        if let Some(address) = given {
                            prop_assert!(is_for_containers(subnet(), address));
                            prop_assert!(model.insert(address), "{} was given twice", address);
                        }
                    }
                    Step::Release(last) => {
                        prop_assert_eq!(allocator.release(at(last)), model.remove(&at(last)));
                    }
                }
                prop_assert!(allocator.taken().eq(model.iter().copied()));
            }
        }

        #[test]
        fn what_was_released_first_comes_back_first(released in Just((2..=254).collect::<Vec<u8>>()).prop_shuffle()) {
            let mut allocator = Allocator::new(subnet(), []);
            while allocator.allocate().is_some() {}
            for &last in &released {
                allocator.release(Ipv4Addr::new(100, 100, 1, last));
            }
            for last in released {
                prop_assert_eq!(allocator.allocate(), Some(Ipv4Addr::new(100, 100, 1, last)));
            }
        }
    }

    #[test]
    fn a_released_address_waits_for_the_unused_ones() {
        let mut allocator = Allocator::new(subnet(), []);
        let first = allocator.allocate().unwrap();
        assert_eq!(first, Ipv4Addr::new(100, 100, 1, 2));
        allocator.release(first);
        let given: Vec<_> = std::iter::from_fn(|| allocator.allocate()).collect();
        assert_eq!(given.len(), 253);
        assert_eq!(given.last(), Some(&first));
    }

    #[test]
    fn the_last_address_is_for_who_needs_it_now() {
        let mut allocator = Allocator::new(subnet(), []);
        let given: Vec<_> = std::iter::from_fn(|| allocator.allocate_in_advance()).collect();
        assert_eq!(given.len(), 252);
        assert_eq!(allocator.allocate(), Some(Ipv4Addr::new(100, 100, 1, 254)));
        allocator.release(given[0]);
        assert_eq!(allocator.allocate_in_advance(), None);
        assert_eq!(allocator.allocate(), Some(given[0]));
    }

    #[test]
    fn addresses_with_owners_until_lately_rest() {
        let at = |last: u8| Ipv4Addr::new(100, 100, 1, last);
        let mut allocator = Allocator::new(subnet(), [at(4)]);
        allocator.rest([at(3), at(2), at(4), Ipv4Addr::LOCALHOST]);
        let given: Vec<_> = std::iter::from_fn(|| allocator.allocate()).collect();
        assert_eq!(given.len(), 252);
        assert_eq!((given[0], &given[250..]), (at(5), &[at(3), at(2)][..]));
    }

    #[test]
    fn the_smallest_subnet_has_room_for_one() {
        let mut allocator = Allocator::new("10.0.0.4/30".parse().unwrap(), []);
        assert_eq!(allocator.gateway(), Ipv4Addr::new(10, 0, 0, 5));
        assert_eq!(allocator.allocate(), Some(Ipv4Addr::new(10, 0, 0, 6)));
        assert_eq!(allocator.allocate(), None);
    }
}
