"""Words that the tasks draw keys and lists from: common English ones, written for this purpose."""


def _listed(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NOUNS = _listed(
    """
acorn actor airport album alley almond anchor angle ankle answer antenna apple apron arch arena
armor arrow artist ash attic aunt author autumn avenue axle badge bagel bakery balcony ball
ballad balloon bamboo banana bandage banjo bank banner barber bark barley barn barrel basin
basket bat battery bay beach bead beak beam bean bear beard beaver bed bee beetle bell belt
bench berry bicycle bird biscuit blanket blossom boat bolt bone book boot border bottle boulder
bow bowl box bracelet branch brass bread breeze brick bridge brook broom brother brush bubble
bucket buckle bud buffalo bugle bulb bullet bundle bus bush butcher butter button cabbage cabin
cable cactus cage cake calendar calf camel camera camp canal candle candy cannon canoe canvas
canyon cap captain car caravan carpet carriage carrot cart castle cat cattle cave cedar ceiling
cellar cello cement century cereal chain chair chalk chapel chapter charcoal chart cheese cherry
chess chest chestnut chicken chief child chimney chin church cider cinema circle circus city
clam clay clerk cliff clinic cloak clock cloth cloud clover coach coal coast coat cobbler
coconut coffee coin collar college colony column comb comet compass concert cook copper coral
cord cork corn corner cottage cotton couch council counter country courage cousin cow crab
cradle crane crater crayon cream creek crew cricket crop crow crown crystal cube cucumber cup
curtain curve cushion customer dairy daisy dam dancer dawn deer delta dentist desert desk
diamond diary dinner dish ditch doctor dog doll dollar dolphin donkey door dough dove dragon
drawer dream dress drill drum duck dune dusk dust eagle ear earth easel echo editor egg elbow
elephant elevator elm ember emperor engine envelope evening eye fabric factory falcon family
farm farmer father feather fence fern ferry festival fiddle field fig finger fire fish flag
flame flask flock flood floor flour flower flute fog forest fork fort fossil fountain fox frame
friend frog frost fruit furnace galaxy gallery game garage garden garlic garment gate giant
ginger giraffe glacier glass globe glove goat gold goose gorilla grain grape grass gravel grove
guard guest guide guitar gull hail hair hall hammer hammock hamster hand harbor hare harp
harvest hat hawk hazel heart hedge heel helmet hen herb hero heron hill hinge hive hockey
holiday honey hood hoof hook horizon horn horse hospital hotel hour house hut ice inch ink inn
insect iron island ivory ivy jacket jaguar jam jar jelly jewel judge jug juice jungle jury
kernel kettle key king kitchen kite kitten knee knife knight knot label lace ladder lake lamb
lamp lane lantern lark lava lawn lawyer leaf leather ledge lemon lens leopard letter lettuce
library lid lighthouse lily lime linen lion lip lizard lobster lock log lotus lumber lunch
machine magnet maid mail mango mantle map maple marble margin market marsh mask mast mattress
mayor meadow meal medal melon merchant metal meteor mill miner mirror mist mitten moat model
monkey moon moose morning mosaic moss moth mother motor mountain mouse mouth mule muscle museum
mushroom mustard nail napkin neck necklace needle nest net nettle nickel night nurse nut oak oar
oasis oat ocean octopus olive onion opal opera orange orchard orchid organ ostrich otter oven
owl ox oyster package paddle page painter palace palm panda panel panther paper parade parcel
parrot pasta path paw pea peach peacock pear pearl pebble pen pencil penguin pepper perch petal
piano picnic pie pigeon pillow pilot pine pipe pirate pitcher planet plank plate platform plum
pocket poem poet pond pony poplar porch port potato pottery powder prairie prince prison prize
puddle pump pumpkin puppet puppy purse puzzle pyramid quail quarry quartz queen quilt rabbit
raccoon radar radio radish raft rail rain raisin ranch raven razor reed reef ribbon rice rider
ridge rifle ring river road robin rocket rod roof room rope rose rubber ruby rug ruler saddle
sail sailor salad salmon salt sand sandal satchel sauce saucer sausage saw scale scarf school
science scissors scooter screen screw sea seal season seat seed shadow shark sheep shelf shell
shepherd shield ship shirt shoe shop shore shoulder shovel shrimp shutter silk silver singer
sink sister skirt sky slate sled sleeve slipper snail snake snow soap sock sofa soil soldier
soup spade spark sparrow spice spider spinach spoon spring spruce squirrel stable stadium stair
stamp star station statue steam steel stem stick stone stool storm story stove straw stream
street string student sugar suit summer sun swallow swamp swan sweater sword table tailor tank
tape target taxi tea teacher temple tennis tent thicket thimble thistle thread throne thumb
thunder ticket tide tiger timber tin toad toast tomato tongue tooth torch tower town toy track
tractor trail train trap tray treasure tree triangle trophy trout truck trumpet trunk tulip
tunnel turkey turnip turtle twig umbrella uncle valley van vase vault vegetable velvet village
vine vinegar violet violin visitor volcano voyage wagon waiter wall walnut walrus wasp watch
water wave wax weasel weather web whale wheat wheel whistle widow willow wind window wine wing
winter wizard wolf wood wool worm wreath wrist yacht yard yarn year zebra zipper
"""
)
ADJECTIVES = _listed(
    """
able absent amber ample ancient angry arctic atomic average awake awkward bald bare basic beige
bitter bland blank bleak blind blond blue blunt bold boring brave brief bright brisk brittle
broad broken bronze brown busy calm careful careless casual cautious central cheap cheerful
chilly civic civil classic clean clear clever cloudy clumsy coarse cold common complex cool
costly crazy creamy crimson crisp crooked cruel curious curly damp daring dark dear decent deep
delicate dense digital dim direct distant dizzy double dreary dry dull dusty eager early eastern
easy elastic elder elegant empty endless equal even exact exotic expert faint fair faithful
false famous fancy fast fatal feeble fierce final fine firm flat fluffy foggy fond foreign
formal fragile frail free frequent fresh frozen full funny fuzzy gentle genuine ghostly gifted
gigantic glad gloomy glossy golden graceful grand grave gray greasy great greedy green grim
guilty handy happy hard harsh hasty hazy healthy heavy hidden high hollow holy honest hostile
huge humble humid hungry icy ideal idle immense jolly joyful keen kind large late lazy lean
legal level light likely limp liquid little lively local lofty lonely long loose loud lovely
loyal lucky lunar mad magic main major marine massive mature medical mellow mental merry mighty
mild minor misty mobile modern modest moist moral muddy mute mystic naked narrow nasty native
natural naval neat nervous neutral new nimble noble noisy normal northern novel obvious odd
official old open orderly ornate outer oval pale partial patient peaceful perfect petite pink
plain plastic playful pleasant polar polite poor popular precise pretty private prompt proper
proud public pure purple quaint quick quiet random rapid rare raw ready real recent red regal
regular remote rich rigid ripe robust rocky rosy rotten rough round royal rude rural rusty
sacred sad safe salty sandy scarce scarlet secret secure senior serene severe shabby shaggy
shallow sharp shiny short shy silent silky silly simple single sleepy slender slim slow small
smart smooth snowy social soft solar solemn solid sour southern spare special speedy spicy
spiral splendid square stale steady steep stern sticky stiff still stormy stout strange strict
strong sturdy subtle sudden sunny super sure sweet swift tall tame tart tender tense thick thin
thirsty tidy tight timid tiny tired total tough tragic tranquil true typical ugly uneven unique
upper upright urban urgent useful usual vacant vague valid vast velvety vibrant violent vital
vivid warm wary weak wealthy weary western wet whole wicked wide wild wise witty wooden woolly
worthy yellow young zealous
"""
)
VERBS = _listed(
    """
accept admire agree allow announce appear arrange arrive attend avoid bake balance become begin
believe belong bend blend blink borrow bounce breathe bring build bury carry carve celebrate
change chase choose climb collect compare complain confess connect consider cover crawl create
cross dance decide deliver depend describe destroy dig disagree discover divide draw drift drive
earn educate embark encourage enjoy enter escape examine explain explore fasten fetch float
follow forget forgive gather generate give glow greet grow guess handle happen hear hesitate
hide hope hurry imagine improve inform inspect invent invite jog join juggle jump kneel knit
knock laugh launch lead learn lend listen live look manage measure melt mend move multiply
notice obey observe obtain occur offer operate permit plant polish pour praise prefer prepare
protect provide pull push raise reach receive recognize reduce remember repair repeat replace
reply rescue return roam roar rush scatter search select send sew share shiver shout shrink
shuffle sing skate sleep slide smile sneeze solve sort speak spell spin spread squeeze stand
stir stretch study suggest surprise surround swim swing teach tease throw tickle touch translate
travel treat tremble trust turn twist understand unite vanish visit wait wander warn wash weave
welcome whisper win wink wipe wonder work worry wrap write yawn
"""
)

# Keys of needles, as "adjective-noun".
KEYS = len(ADJECTIVES) * len(NOUNS)
# Words of lists: these, or where a list needs more of them, pairs such as "honey-lantern".
PLAIN = tuple(sorted({*NOUNS, *ADJECTIVES, *VERBS}))
PAIRS = len(NOUNS) ** 2


def key_name(number: int) -> str:
    """Return key `number` in 0..KEYS - 1."""
    first, second = divmod(number, len(NOUNS))
    return f"{ADJECTIVES[first]}-{NOUNS[second]}"


def pair(number: int) -> str:
    """Return pair `number` in 0..PAIRS - 1."""
    first, second = divmod(number, len(NOUNS))
    return f"{NOUNS[first]}-{NOUNS[second]}"
